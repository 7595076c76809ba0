"""A decode step, compiled for a TPU and an H100 that are not here, neither copies nor joins caches."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pargs_jax.aot.gpu import is_installed
from pargs_jax.aot.hlo import parse_module

REPOSITORY = Path(__file__).parents[2]
ROWS, PROMPT, NEW, K, HEADS, WIDTH = 4, 256, 64, 10, 4, 256
SHAPES = {
    "llama": {
        "model_type": "llama", "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 512,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 64, "n_embd": WIDTH, "n_inner": 256, "n_layer": 2, "n_head": HEADS,
        "n_positions": 512,
    },
}  # fmt: skip
COMPILED = f"""
import sys
from pargs_jax.aot import expect_no_devices
mesh, folder = sys.argv[1:]
expect_no_devices(mesh)
from pargs_jax.commands.compile_only import lower
from pargs_jax.commands.decode import describe_program
from pargs_jax.config import DecodeConfig
from pargs_jax.mesh import make_topology_mesh
config = DecodeConfig(
    lm=folder, rm=(folder,), mesh=mesh, compile_only=True, method="pargs", dtype="bfloat16",
    batch_size={ROWS}, prompt_length={PROMPT}, max_new_tokens={NEW}, k={K},
)
topology = make_topology_mesh(mesh, "decode")
print(lower(topology, *describe_program(config, topology)).compile().as_text())
"""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)
needs_gpu_compiler = pytest.mark.skipif(
    not is_installed(), reason="compiling for a GPU needs the extra: pip install -e '.[compile-gpu]'"
)


def compiled(mesh, shape, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, mesh, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def copies_of_caches(text):
    """Instructions in a program's loops that copy or join arrays as large as one layer's keys."""
    module = parse_module(text)
    entry = module.computations[module.entry]
    pending = [name for x in entry.values() if x.opcode == "while" for name in x.computations("body")]
    assert pending
    seen, found = set(), []
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for x in module.computations[name].values():
            pending += x.computations("body", "branch_computations", "calls", "to_apply", "called_computations")
            sizes = [
                math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", x.shape)
            ]
            if x.opcode in ("copy", "copy-start", "concatenate", "transpose", "pad") and max(sizes) >= KEYS:
                found.append(f"{x.name}: {x.shape}")
    return found


KEYS = ROWS * (PROMPT + NEW) * WIDTH  # more than any weight and any activation, those that read the prompts included


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "mesh", [pytest.param("tpu-v5e-1", marks=needs_libtpu), pytest.param("gpu-1", marks=needs_gpu_compiler)]
)
def test_a_step_copies_no_cache(mesh, shape, tmp_path):
    text = compiled(mesh, shape, tmp_path)
    assert copies_of_caches(text) == []
