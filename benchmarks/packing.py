r"""Training speed on real pairs: `partial_bt` steps on packed batches, against steps on batches of padded rows.

    python benchmarks/packing.py --data hh_helpful.train.jsonl.gz --tokenizer gpt2      # width 384, a CPU: 10 minutes
    python benchmarks/packing.py --data F --model FOLDER            # a causal model with its tokenizer, from a folder

The data are rows of `prompt`, `chosen` and `rejected`. Every layout makes its own batches of the same rows. A timed run
takes steps that are spread evenly over an epoch; each step is loss, gradient, clipping and AdamW.

Before the timing, the loss and the gradient norm of each packed batch must agree with those of the same batch unpacked.
The learning rate is next to nothing, so they would at every step.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
from models import SHAPES, random_params

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.data.examples import Example, tokenise
from pargs_jax.data.packing import Packing
from pargs_jax.data.preferences import load_preferences
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.hf import load_model
from pargs_jax.models.model import Params
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.text.prompts import PROMPT_FORMS, get_form
from pargs_jax.text.tokenization import TextTokenizer
from pargs_jax.training.meter import BatchSize, size_of
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_optimizer, make_train_step

PADDED = "padded rows"
AGREEMENT = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, of losses and gradient norms


class Trainer:
    """Takes steps on any batches from one state, which each donates to the next."""

    def __init__(self, model: CausalModel, params: Params, dtype: str) -> None:
        optimizer, _ = make_optimizer(OptimConfig(lr=1e-12, schedule="constant", warmup=0.0), steps=1)
        self._step = make_train_step(Objective(model, OBJECTIVES["partial_bt"](), dtype), optimizer)
        state = TrainState(params, jax.jit(optimizer.init)(params), jnp.zeros((), jnp.int32))
        self._state = jax.device_put(state, jax.devices()[0])

    def run(self, batches: list[Batch]) -> list[tuple[float, float]]:
        """The loss and the gradient norm of a step on each batch."""
        results = []
        for batch in batches:
            self._state, metrics = self._step(self._state, batch, jax.random.key(0))
            results.append((metrics["loss"], metrics["gradient_norm"]))
        return [tuple(map(float, result)) for result in results]


def main() -> None:
    args = parse_arguments()
    model, params, tokenizer = load(args)
    rows = load_preferences(args.data, get_form(args.format), tokenizer=tokenizer, require_rejected=True).rows
    examples, report = tokenise(rows, tokenizer, args.max_length)
    print(f"{args.data}: {report}", flush=True)
    layouts = {PADDED: None} | {f"packed in rows of {width}": Packing(width) for width in args.packs}
    batches = {name: epoch_of(examples, packing, args) for name, packing in layouts.items()}
    sizes = {name: [size_of(batch) for batch in epoch] for name, epoch in batches.items()}
    timed = np.linspace(0, len(batches[PADDED]) - 1, args.steps).astype(int)
    chosen = {name: [epoch[step] for step in timed] for name, epoch in batches.items()}
    trainer = Trainer(model, params, args.dtype)
    difference = largest_difference(trainer, [steps[0] for name, steps in chosen.items() if name != PADDED])
    if not difference <= AGREEMENT[args.dtype]:
        raise SystemExit(f"losses or gradient norms of packed batches differ by {difference:.1g} of those unpacked")
    runs = {name: partial(trainer.run, steps) for name, steps in chosen.items()}
    seconds = measure.interleaved(runs, args.repeats)
    speeds = [speed_row(name, seconds, sizes, len(chosen[name]), args) for name in layouts]
    text = summary(args, measure.table(speeds), difference)
    name = args.name or f"packing_{Path(args.model).name}_{args.max_length}_{args.dtype}_{jax.default_backend()}"
    path = measure.write_result(name, {"settings": vars(args), "layouts": speeds}, text)
    print(f"{text}\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="pairs: a file or hub id, as train.py takes")
    parser.add_argument("--format", choices=PROMPT_FORMS, default="hh", help="prompt format")
    parser.add_argument("--model", default="width-384", help=f"one of {', '.join(SHAPES)}, or a folder or hub id")
    parser.add_argument("--tokenizer", help="folder or hub id of a tokenizer, for a shape")
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32", help="of the matrix products")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens of prompt and answer together")
    parser.add_argument("--packs", type=int, nargs="+", default=[640, 1024], help="tokens of a packed row")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs a step")
    parser.add_argument("--steps", type=int, default=4, help="steps of a timed run")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs")
    parser.add_argument("--name", help="of the result files (default: from model, length, dtype and platform)")
    args = parser.parse_args()
    if (args.model in SHAPES) != (args.tokenizer is not None):
        parser.error("--tokenizer goes with a shape; a model's folder has its own")
    if min(args.packs) < args.max_length:
        parser.error(f"--packs must be at least --max-length ({args.max_length})")
    return args


def load(args: argparse.Namespace) -> tuple[CausalModel, Params, TextTokenizer]:
    if args.model in SHAPES:
        model = CausalModel(SHAPES[args.model], "reward")
        return model, random_params(model, 0, "float32"), TextTokenizer.load(args.tokenizer)
    loaded = load_model(args.model, "reward")
    return loaded.model, loaded.params, TextTokenizer.load(args.model)


def epoch_of(examples: list[Example], packing: Packing | None, args: argparse.Namespace) -> list[Batch]:
    """All whole batches of an epoch."""
    batches = Batches(examples, args.batch_size, args.max_length, seed=0, packing=packing)
    return [batches.batch(step) for step in range(len(examples) // args.batch_size)]


def largest_difference(trainer: Trainer, packed: list[Batch]) -> float:
    """The largest relative difference of losses and gradient norms of batches packed and unpacked."""
    results, expected = trainer.run(packed), trainer.run([batch._replace(packed=None) for batch in packed])
    return float(np.abs(np.divide(results, expected) - 1).max())


def speed_row(
    name: str,
    seconds: dict[str, measure.Spread],
    sizes: dict[str, list[BatchSize]],
    steps: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    pairs = args.batch_size * len(sizes[name])
    slots, padded = (sum(size.slots for size in sizes[layout]) for layout in (name, PADDED))
    return {
        "layout": name,
        "slots a pair": slots / pairs,
        "of the padded": slots / padded,
        "padding share": sum(size.padding for size in sizes[name]) / slots,
        "ms a pair": measure.Spread.of(1e3 * s / steps / args.batch_size for s in seconds[name].runs),
        "times as fast": seconds[PADDED].over(seconds[name]),
    }


def summary(args: argparse.Namespace, speeds: str, difference: float) -> str:
    """The result in markdown."""
    return f"""\
# Packed batches: {Path(args.model).name}, {args.dtype}, {Path(args.data).name} cut to {args.max_length} tokens

{speeds}

`partial_bt`, {args.batch_size} pairs a step. Slots are the tokens and the padding that a pass computes, over a whole
epoch. Times are of {args.steps} steps spread over the epoch, median of {args.repeats} runs (lowest to highest). The
layouts take turns, and ratios are taken round by round.

Losses and gradient norms of packed batches differ by at most {difference:.1g} from those of the same batches unpacked.
"""


if __name__ == "__main__":
    main()
