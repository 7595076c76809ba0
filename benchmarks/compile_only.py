"""What the programs of a TPU v4-8 and of one H100 take, compiled without either: the tables of docs/machines.md.

    python benchmarks/compile_only.py --out benchmarks/results/compile_only_tpu_v4_8.md
    python benchmarks/compile_only.py --mesh gpu-1 --out benchmarks/results/compile_only_h100.md

The first needs the extra `tpu`, the second `compile-gpu`; each takes about a quarter of an hour on 2 cores. `--only
llama` runs the cases with that in their name.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pargs_jax.aot import expect_no_devices
from pargs_jax.config import DecodeConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.config_files import from_mapping, read_yaml

MESH, H100 = "tpu-v4-8", "gpu-1"
SHAPES = "configs/shapes"
COLUMNS = {
    "peak GiB": "GiB a device",
    "arguments GiB": "of it arguments",
    "temporaries GiB": "temporaries",
    "operations": "operations",
    "sent GB": "GB a device sends",
    "ms at peak rates": "ms at peak rates",
    "compile s": "s to compile",
}
H100_COLUMNS = {
    "peak GiB": "GiB",
    "arguments GiB": "of it arguments",
    "kernels a step": "kernels a step",
    "GB a step": "GB a step",
    "least GB a step": "least possible",
    "times the least": "times that",
}


def training_cases() -> dict[str, TrainConfig]:
    llama = from_mapping(TrainConfig, read_yaml("configs/llama2_7b.yaml"), "configs/llama2_7b.yaml")
    shape = dataclasses.replace(llama.model, init=f"{SHAPES}/llama-2-7b")
    llama = dataclasses.replace(llama, mesh=MESH, model=shape)
    deberta = TrainConfig(
        mesh=MESH,
        dtype="bfloat16",
        max_length=512,
        batch_size=16,
        model=ModelConfig(init=f"{SHAPES}/deberta-v3-large", remat="layers"),
        objective=ObjectiveConfig(chunk=4),
        optim=OptimConfig(lr=5e-6),
    )
    prefix_causal = dataclasses.replace(deberta.model, attention="prefix_causal")
    return {
        "train the demo's model, 8 pairs": TrainConfig(mesh=MESH),
        "train llama-2-7b, all weights, 32 pairs": llama,
        "train llama-2-7b, LoRA of rank 16, 32 pairs": dataclasses.replace(llama, lora=LoraConfig(rank=16)),
        "train deberta-v3-large, every prefix a text, 16 pairs": deberta,
        "train deberta-v3-large, prefix_causal, 16 pairs": dataclasses.replace(deberta, model=prefix_causal),
    }


def decoding_cases() -> dict[str, DecodeConfig]:
    models = {
        "llama-2-7b alone": ("llama-2-7b",),
        "llama-2-7b + gpt2-large": ("llama-2-7b", "gpt2-large"),
        "llama-2-7b + deberta-v3-large (`data=4`)": ("llama-2-7b", "deberta-v3-large"),
        "llama-2-7b + deberta-v3-large, prefix_causal": ("llama-2-7b", "deberta-v3-large-prefix-causal"),
        "qwen2.5-7b + llama-3.1-8b": ("qwen2.5-7b", "llama-3.1-8b"),
    }
    return {
        f"decode {name}": DecodeConfig(
            lm=f"{SHAPES}/{lm}",
            rm=tuple(f"{SHAPES}/{guide}" for guide in guides),
            # An encoder reads so many texts that splitting rows is far cheaper than splitting its matrices.
            mesh=f"{MESH},data=4" if guides == ["deberta-v3-large"] else MESH,
            compile_only=True,
            dtype="bfloat16",
            batch_size=32,
            prompt_length=512,
            max_new_tokens=128,
        )
        for name, (lm, *guides) in models.items()
    }


def h100_cases() -> dict[str, DecodeConfig]:
    """Pairs in which the reward model shares the language model's tokens."""
    pair = {"llama-2-7b": "llama-2-7b + llama-2-7b", "gpt2-large": "gpt2-large + gpt2-large"}
    return {
        f"decode {pair[shape]}, {rows} prompt{'s' * (rows > 1)}": DecodeConfig(
            lm=f"{SHAPES}/{shape}",
            rm=(f"{SHAPES}/{shape}",),
            mesh=H100,
            compile_only=True,
            dtype="bfloat16",
            batch_size=rows,
            prompt_length=128,
            max_new_tokens=128,
        )
        for shape in pair
        for rows in (1, 16, 64)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--mesh", default=MESH, choices=(MESH, H100), help="what is compiled for")
    parser.add_argument("--only", default="", help="run the cases with this in their name")
    given = parser.parse_args()
    expect_no_devices(given.mesh)
    from pargs_jax.commands import decode, train

    cases: dict[str, Callable] = {}
    if given.mesh == MESH:
        cases |= {name: partial(train.compile_only, config) for name, config in training_cases().items()}
    decoding = decoding_cases() if given.mesh == MESH else h100_cases()
    cases |= {name: partial(decode.compile_only, config) for name, config in decoding.items()}
    columns = COLUMNS if given.mesh == MESH else H100_COLUMNS
    lines = ["| | fits | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, compile_case in cases.items():
        if given.only in name:
            cells = compile_case().as_row()
            lines.append(f"| {name} | {cells['fits']} | " + " | ".join(cells[key] for key in columns) + " |")
            print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
