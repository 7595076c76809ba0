"""One run on an accelerator: how fast decoding and training are, how far from their limits, and what the time goes to.

    python benchmarks/accelerator.py                          # under ten minutes on one H100 or H200
    python benchmarks/accelerator.py --pairs hh_helpful.test.jsonl.gz --tokenizers gpt2 llama deberta_v3    # all parts
    python benchmarks/accelerator.py --tiny --seconds 120     # does it run at all? (a CPU)

The parts run in the order of what they tell. Each writes its numbers to `benchmarks/results/accelerator_<device>.json`
when it is done, and the table to the `.md` beside it; a second run does only the parts that are missing. No part is
begun that would probably end after `--seconds`.

- decode: a language model guided by its like with `pargs`, k 10, prompts of 128 tokens, 128 new ones, ended by no
  end-of-sequence token. A step's time is the median over chunks of 32 steps, prompts read before. Limit: the weights,
  and the keys and values of the texts so far, read once at the bandwidth measured here, or the operations at the rate
  measured here, whichever takes longer.
- decode, variants: weights in int8; and with other flags of XLA, each in a process of its own.
- train: a `partial_bt` step on texts of 512 tokens, all weights or LoRA of rank 16, with the attention that the device
  chooses and with the plain one. Share of the peak: three passes' operations (two, with frozen weights) over all texts
  at the rate measured here; recomputation under `remat` counts as nothing.
- profile: a chunk of decoding steps under JAX's profiler: kernels a step, the share of the time in which the device is
  busy, and the kernels that take longest.
- refill (needs `--pairs` and `--tokenizers`): HH's prompts by rows that refill and by a call a batch, two models of
  GPT-2-large's shape, 16 rows. The whole table of `refill.py` is in a file of its own.
- encoder (needs `--tokenizers`): a DeBERTa-v3-large guides GPT-2-large or Llama-2-7B, the pairs of the PARGS
  paper's Figure 3, texts of 512 tokens, batch 1. The whole table of `encoders.py` is in a file of its own.

Weights are random: nothing here depends on them.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from models import SHAPES, causal_pass

from pargs_jax.config import LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.data.batches import Batch
from pargs_jax.decoding.guides import CausalGuide
from pargs_jax.decoding.loop import Decoder, advance, row_keys, start
from pargs_jax.decoding.proposals import TopK
from pargs_jax.decoding.rules import Sample
from pargs_jax.decoding.state import DecodeState, RowSettings
from pargs_jax.models import attention
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.int8 import quantise_layers
from pargs_jax.models.model import Params, unrolls_by_default, unstack_layers
from pargs_jax.training.program import TrainingProgram
from pargs_jax.training.step import begin

K, PROMPT, NEW, CHUNK = 10, 128, 128, 32
TEXT = 512
FLAGS = {
    "no joined products": "--xla_gpu_dot_merger_threshold_mb=0",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
}
LONGEST_KERNELS = 5


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the run: `measure` returns rows of the table; `seconds` is what it takes on an H100, about."""

    name: str
    seconds: float
    measure: Callable[[measure.Ceilings], list[dict[str, Any]]]


def main() -> None:
    args = parse_arguments()
    began = time.monotonic()
    device = jax.devices()[0].device_kind
    name = args.name or f"accelerator_{'tiny_' * args.tiny}{device.lower().replace(' ', '_')}"
    path = measure.RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() and not args.part else {}
    ceilings = measure.ceilings(jnp.dtype("bfloat16"))
    print(f"{device}: reads {ceilings.bandwidth / 1e9:,.0f} GB/s, multiplies {ceilings.matmul / 1e12:,.1f} TFLOP/s")
    for part in parts(args, name):
        left = args.seconds - (time.monotonic() - began)
        if part.name in found or (args.part and part.name != args.part):
            continue
        if part.seconds > left:
            print(f"{part.name}: left out, {left:.0f} s are left; run the same command again", flush=True)
            continue
        since = time.monotonic()
        try:
            found[part.name] = part.measure(ceilings)
        except Exception as error:  # the other parts are worth having
            print(f"{part.name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        print(f"{part.name}: {time.monotonic() - since:.0f} s", flush=True)
        if args.part:  # a child: its rows go to the process that began it
            print(json.dumps(found[part.name], default=dataclasses.asdict))
            return
        text = report(found, ceilings)
        measure.write_result(name, {"ceilings": ceilings, "parts": found}, text)
    print(report(found, ceilings))


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=570, help="begin no part that would end later")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see whether it runs")
    parser.add_argument("--pairs", help="HH's pairs, a file of prompt, chosen, rejected")
    parser.add_argument(
        "--tokenizers", nargs=3, metavar="FOLDER", help="of GPT-2, Llama and DeBERTa-v3: folders or hub ids"
    )
    parser.add_argument("--part", help="only this part, whose rows are printed as JSON")
    parser.add_argument("--name", help="of the result files (default: from the device)")
    return parser.parse_args()


def parts(args: argparse.Namespace, name: str) -> Iterator[Part]:
    """All parts, the most telling first."""
    small, large = ("tiny", "tiny") if args.tiny else ("gpt2-large", "llama-2-7b")
    for batch in (1, 16):
        yield Part(f"decode {large} x 2, {batch}", 60, partial(decode_rows, large, batch))
    yield Part(f"train {large}, LoRA", 60, partial(train_rows, large, 8, 16))
    yield Part(f"profile {large} x 2, 16", 40, partial(profile_rows, large, 16))
    yield Part(f"decode {large} x 2, 16, int8", 60, partial(decode_rows, large, 16, is_int8=True))
    yield Part(f"decode {large} x 2, 64", 60, partial(decode_rows, large, 64))
    for batch in (1, 16, 64):
        yield Part(f"decode {small} x 2, {batch}", 30, partial(decode_rows, small, batch))
    yield from parts_on_texts(args, name)
    yield Part(f"train {small}, all weights", 40, partial(train_rows, small, 16, 0))
    yield Part(f"profile {small} x 2, 16", 30, partial(profile_rows, small, 16))
    for variant, flag in FLAGS.items():
        part = f"decode {small} x 2, 16"
        yield Part(f"{part}, {variant}", 50, partial(with_flag, part, flag, args.tiny))


def parts_on_texts(args: argparse.Namespace, name: str) -> Iterator[Part]:
    """The parts that need real texts or tokenizers; other benchmarks of this folder, in processes of their own."""
    if args.tokenizers is None:
        print("refill, encoder: left out, they need --tokenizers")
        return
    gpt2, llama, deberta = args.tokenizers
    if args.pairs is None:
        print("refill: left out, it needs --pairs")
    else:
        size = "--prompts 8 --tokens 8 --batch 4" if args.tiny else "--width 1280 --layers 36 --dtype bfloat16"
        words = ["--pairs", args.pairs, "--tokenizer", gpt2, "--repeats", "1", *size.split()]
        yield Part("refill gpt2-large x 2", 90, partial(other_benchmark, "refill", f"{name}_refill", words, refill_row))
    for lm, tokenizer in {"gpt2-large": gpt2, "llama-2-7b": llama}.items():
        size = ["--lm", lm, "--shape", "large", "--texts", "512"]
        own = [*size, "--lm-tokenizer", tokenizer, "--rm-tokenizer", deberta]
        words = ["--lm", "tiny", "--shape", "tiny", "--texts", "32"] if args.tiny else own
        words = [*words, "--dtype", "bfloat16", "--skip-torch", "--only-decoding"]
        run = partial(other_benchmark, "encoders", f"{name}_encoder_{lm}", words, partial(encoder_row, args.tiny, lm))
        yield Part(f"encoder guides {lm}", 90, run)


def other_benchmark(
    script: str, name: str, words: list[str], row_of: Callable[[dict[str, Any]], dict[str, Any]], _: measure.Ceilings
) -> list[dict[str, Any]]:
    """Rows of another script's table, which it writes to files of this name."""
    model_of.cache_clear()  # the other process needs the device's memory
    subprocess.run(
        [sys.executable, Path(__file__).with_name(f"{script}.py"), "--name", name, *words],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((measure.RESULTS / f"{name}.json").read_text())
    return [row_of(row) for row in found["rows" if script == "refill" else "decoding"]]


def refill_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "what": f"HH's prompts, {row['what']}: {_shown(row['answers/min'])} answers/min",
        "tokens/s": row["tokens/s"],
    }


def encoder_row(is_tiny: bool, lm: str, row: dict[str, Any]) -> dict[str, Any]:
    guides = {"encoder": "full attention", "prefix_causal": "prefix-causal attention"}
    whose = f"DeBERTa-v3-large, {guides[row['guide']]}" if row["guide"] in guides else row["guide"]
    return {
        "what": f"{'tiny, for ' * is_tiny}{lm}, text of {row['text']}: {whose}",
        "rows": 1,
        "ms a step": row["ms a step"],
        "limit, ms": row["limit, ms"],
        "share of the limit": row["limit, ms"] / row["ms a step"]["median"],
    }


def decode_rows(shape: str, batch: int, ceilings: measure.Ceilings, *, is_int8: bool = False) -> list[dict[str, Any]]:
    """A step's time for a model guided by its like."""
    lm, rm = model_of(shape, "vocabulary", is_int8), model_of(shape, "reward", is_int8)
    compiled_in, run_chunks = decoding(lm, rm, batch)
    steps = [1e3 * seconds / CHUNK for seconds in run_chunks()]
    least = 1e3 * np.mean([least_step(lm[0], rm[0], batch, PROMPT + n, ceilings, is_int8) for n in range(NEW)])
    return [
        {
            "what": f"decode {shape} x 2{', int8' * is_int8}",
            "rows": batch,
            "ms a step": measure.Spread.of(steps),
            "limit, ms": float(least),
            "share of the limit": float(least / np.median(steps)),
            "tokens/s": 1e3 * batch / float(np.median(steps)),
            "s to compile": compiled_in,
        }
    ]


def train_rows(shape: str, pairs: int, rank: int, ceilings: measure.Ceilings) -> list[dict[str, Any]]:
    """A step's time with the attention that the device chooses, and with the plain one."""
    rows, chosen = [], attention.choose_kernel
    model = CausalModel(SHAPES[shape], "reward")
    length = min(TEXT, model.config.max_positions)
    batch = random_pairs(model.config.vocab_size, pairs, length)
    texts = 2 * pairs * length
    passes = causal_pass(model, 2, queries=texts, seen=(length + 1) / 2)
    least = (2 if rank else 3) * passes.operations / ceilings.matmul
    kernel = chosen(jnp.dtype("bfloat16"), length, model.config.width // model.config.heads)
    for name in dict.fromkeys((kernel, "plain")):
        attention.choose_kernel = lambda *_, name=name, **__: name
        try:
            seconds = train_seconds(model, batch, pairs, rank)
        finally:
            attention.choose_kernel = chosen
        rows.append(
            {
                "what": f"train {shape}, {f'LoRA {rank}' if rank else 'all weights'}, attention {name}",
                "rows": 2 * pairs,
                "ms a step": measure.Spread.of(1e3 * s for s in seconds.runs),
                "limit, ms": 1e3 * least,
                "share of the limit": least / seconds.median,
                "tokens/s": texts / seconds.median,
                "s to compile": "",
            }
        )
    return rows


def profile_rows(shape: str, batch: int, _: measure.Ceilings) -> list[dict[str, Any]]:
    """What the device does in a chunk of decoding steps."""
    _, run_chunks = decoding(model_of(shape, "vocabulary"), model_of(shape, "reward"), batch)
    with tempfile.TemporaryDirectory() as folder:
        chunks = run_chunks()
        next(chunks)
        with jax.profiler.trace(folder):
            seconds = next(chunks)
        (file,) = Path(folder).rglob("*.xplane.pb")
        kernels = list(kernels_in(jax.profiler.ProfileData.from_file(str(file))))
    if not kernels:
        return []
    by_name: Counter[str] = Counter()
    for name, nanoseconds in kernels:
        by_name[name] += nanoseconds
    busy = sum(by_name.values()) / 1e9
    longest = ", ".join(f"{name[:40]} {1e-7 * ns / busy:.0f} %" for name, ns in by_name.most_common(LONGEST_KERNELS))
    share = f"{len(kernels) / CHUNK:.0f} kernels a step, busy {100 * busy / seconds:.0f} %"
    return [
        {
            "what": f"profile {shape} x 2: {share}; longest: {longest}",
            "rows": batch,
            "ms a step": measure.Spread.of([1e3 * seconds / CHUNK]),
        }
    ]


def kernels_in(profile: Any) -> Iterator[tuple[str, float]]:
    """Name and nanoseconds of everything that ran in the streams of the first GPU."""
    for plane in profile.planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns) for event in line.events)


def with_flag(part: str, flag: str, tiny: bool, _: measure.Ceilings) -> list[dict[str, Any]]:
    """A part's rows in a process with another flag of XLA, which a process reads only once."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
    words = [sys.executable, __file__, "--part", part, *["--tiny"] * tiny]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    return [row | {"what": f"{row['what']}, {flag}"} for row in rows]


@lru_cache(maxsize=4)
def model_of(shape: str, head: str, is_int8: bool = False) -> tuple[CausalModel, Params]:
    """A model with random bfloat16 weights, drawn on the device, its layers as decoding runs them there."""
    model = CausalModel(SHAPES[shape], head)
    leaves, structure = jax.tree.flatten(model.abstract_params())
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    keys = jax.random.split(jax.random.key(len(head)), len(leaves))
    params = jax.tree.unflatten(structure, [draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    if is_int8:
        model, params = dataclasses.replace(model, int8=True), quantise_layers(params)
    return unstack_layers(model, params) if unrolls_by_default(jax.default_backend()) else (model, params)


def decoding(
    lm: tuple[CausalModel, Params], rm: tuple[CausalModel, Params], batch: int
) -> tuple[float, Callable[[], Iterator[float]]]:
    """Seconds to compile, and a function that decodes a batch and yields the seconds of each chunk of steps."""
    decoder = Decoder(lm[0], (CausalGuide(rm[0]),), TopK(K), Sample())
    params = (lm[1], (rm[1],))
    draw = np.random.default_rng(0)
    prompts = jnp.asarray(draw.integers(0, lm[0].config.vocab_size, (batch, PROMPT), np.int32))
    settings = RowSettings.alike(batch, weights=[1.0], candidates=K, max_new_tokens=NEW)
    inputs = (prompts, jnp.full(batch, PROMPT, jnp.int32), row_keys(0, jnp.arange(batch)), settings)

    def started() -> DecodeState:
        return jax.block_until_ready(start(decoder, params, *inputs, max_new_tokens=NEW))

    began = time.perf_counter()
    compiled = advance.lower(decoder, params, started(), steps=CHUNK).compile()
    seconds = time.perf_counter() - began

    def run_chunks() -> Iterator[float]:
        state = started()
        for _ in range(NEW // CHUNK):
            since = time.perf_counter()
            state = jax.block_until_ready(compiled(params, state))
            yield time.perf_counter() - since

    return seconds, run_chunks


def least_step(
    lm: CausalModel, rm: CausalModel, batch: int, text: int, ceilings: measure.Ceilings, is_int8: bool
) -> float:
    """The limit of a step at texts of so many tokens, in seconds."""
    passes = [
        causal_pass(lm, 2, queries=batch, seen=text, cached=batch * text, logits=batch),
        causal_pass(rm, 2, queries=batch * K, seen=text + 1, cached=batch * text),
    ]
    saved = [causal_pass(model, 1, queries=0, seen=0).bytes_read * is_int8 for model in (lm, rm)]
    return sum(
        ceilings.least_seconds(work.bytes_read - less, work.operations)
        for work, less in zip(passes, saved, strict=True)
    )


def random_pairs(vocab_size: int, pairs: int, length: int) -> Batch:
    """Pairs of random texts without padding, prompt and answer of one length."""
    half, draw = length // 2, partial(np.random.default_rng(0).integers, 0, vocab_size, dtype=np.int32)
    lengths = np.full((pairs, 2), length - half, np.int32)
    return Batch(
        draw((pairs, half)), np.full(pairs, half, np.int32), draw((pairs, 2, length - half)), lengths,
        np.ones(pairs, np.float32),
    )  # fmt: skip


def train_seconds(model: CausalModel, batch: Batch, pairs: int, rank: int) -> measure.Spread:
    """Seconds of a `partial_bt` step: loss, gradient, clipping and AdamW."""
    config = TrainConfig(
        dtype="bfloat16",
        batch_size=pairs,
        max_length=min(TEXT, model.config.max_positions),
        model=ModelConfig(remat="layers"),
        optim=OptimConfig(moment_dtype="bfloat16"),
        lora=LoraConfig(rank=rank),
        objective=ObjectiveConfig(name="partial_bt"),
    )
    program = TrainingProgram.assemble(config, model, closing_id=0)
    dtype = "bfloat16" if rank else "float32"
    leaves, structure = jax.tree.flatten(model.abstract_params())
    drawn = [0.02 * jax.random.normal(jax.random.key(i), x.shape, dtype) for i, x in enumerate(leaves)]
    trained, frozen = program.begin_params(jax.tree.unflatten(structure, drawn), seed=0)
    optimizer, _ = program.make_optimizer(100)
    state = begin(optimizer, trained)
    step, key, placed = program.make_step(optimizer, state), jax.random.key(0), jax.device_put(batch)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, placed, key, frozen)
        jax.block_until_ready(metrics)

    return measure.time_it(run, repeats=5, warmup=2)


def report(found: dict[str, Any], ceilings: measure.Ceilings) -> str:
    """The table in markdown."""
    columns = ("what", "rows", "ms a step", "limit, ms", "share of the limit", "tokens/s", "s to compile")
    rows = [{column: _shown(row.get(column, "")) for column in columns} for part in found.values() for row in part]
    if not rows:
        return "nothing was measured"
    return f"""\
# On an accelerator

{measure.table(rows)}

Medians (lowest to highest). Rates measured here: {ceilings.bandwidth / 1e9:,.0f} GB/s read, \
{ceilings.matmul / 1e12:,.1f} TFLOP/s in large bfloat16 products. `python benchmarks/accelerator.py --help` explains the
columns.
"""


def _shown(value: Any) -> Any:
    """A spread that was read back from a file is a spread again."""
    return measure.Spread(**value | {"runs": tuple(value["runs"])}) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
