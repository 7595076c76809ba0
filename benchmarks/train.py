r"""Training speed: a step of `partial_bt` against one of `bt`, and against the published way to train on prefixes.

    python benchmarks/train.py                                     # a small GPT-2, on a CPU: about three minutes
    python benchmarks/train.py --model tiny --answer 16 --steps 1 --repeats 1   # does it run at all? (seconds)

On a GPU that both frameworks see:

    python benchmarks/train.py --model gpt2-large --dtype bfloat16 --batch 1 8 64 --micro-batch 64
    python benchmarks/train.py --model llama-2-7b --dtype bfloat16 --params bfloat16 --batch 1 8 64 \
        --skip-rows --skip-torch

What is compared, on the same pairs and the same random weights; every step is loss, gradient, clipping and AdamW:

- bt: Bradley-Terry on whole answers, the package's jitted step.
- partial_bt: on every pair of prefixes, all from one pass, the package's jitted step.
- partial_bt packed: the same with each prompt read once for both of its answers, as `train.py --pack` has it.
- prefix rows: the published way to the loss of `partial_bt`. Each prefix of each answer is a text of its own, with a
  forward and a backward pass, here through the package's own `bt` objective: the ratio shows the method alone.
- torch bt, torch prefix rows: the same two in PyTorch (`torch_loops`), eagerly.

Before the timing all run once: losses and gradient norms of those that compute the same must agree. The learning rate
is next to nothing, so they do at every step.

The limit is the least time for what a step must do: three passes' operations over all texts (forward, and twice that
backward) at the peak rate for products, or the weights' reading, and AdamW's reading of its arrays, as measured here.

What favours whom: prefix rows are sorted by length; in JAX they are padded to the next of eight lengths (by default 5 %
more tokens), in PyTorch within a micro-batch. Published codes pad to the longest text and so are slower.
A small vocabulary (`small`, `tiny`) keeps the optimizer's pass over the embedding table, which is alike for all, from
hiding the difference between objectives; `bt` computes the rewards of all prefixes too, and reads one.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from jaxtyping import Array
from models import SHAPES, causal_pass, on_device, random_params, reason_without_torch, torch_device, torch_twin

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch
from pargs_jax.data.packing import Packing
from pargs_jax.freed_memory import keep_freed_memory
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_optimizer, make_train_step

BT, PARTIAL, PACKED = "bt", "partial_bt", "partial_bt packed"
ROWS, TORCH_BT, TORCH_ROWS = "prefix rows", "torch bt", "torch prefix rows"
LENGTHS = 8  # different widths of the prefix rows in JAX
OPTIMIZER = OptimConfig(lr=1e-12, schedule="constant", warmup=0.0)
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, of losses and gradient norms


class StepResult(NamedTuple):
    """What a step reports, for comparison."""

    loss: float
    gradient_norm: float


Runs = dict[str, Callable[[], StepResult]]


class JaxTrainer:
    """Takes steps of any kind from one state, which each donates to the next: a large model would not fit twice."""

    def __init__(self, model: CausalModel, params: Params, dtype: str) -> None:
        self._optimizer, _ = make_optimizer(OPTIMIZER, steps=1)
        state = TrainState(params, jax.jit(self._optimizer.init)(params), jnp.zeros((), jnp.int32))
        # All placed alike: a mix would compile the first step once more, for the placing that it returns.
        self._state = jax.device_put(state, jax.devices()[0])
        objectives = {name: Objective(model, OBJECTIVES[name](), dtype, unrolls=True) for name in (BT, PARTIAL)}
        self._steps = {name: make_train_step(objective, self._optimizer) for name, objective in objectives.items()}
        self._rows_step = make_rows_step(objectives[BT], self._optimizer)

    def run(self, name: str, batch: Batch, steps: int) -> StepResult:
        """`steps` steps of `bt` or `partial_bt`."""
        for _ in range(steps):
            self._state, metrics = self._steps[name](self._state, batch, jax.random.key(0))
        return self._result(metrics)

    def run_rows(self, groups: tuple[Batch, ...]) -> StepResult:
        """One step on `prefix_rows`."""
        self._state, metrics = self._rows_step(self._state, groups)
        return self._result(metrics)

    def _result(self, metrics: Mapping[str, Array]) -> StepResult:
        jax.block_until_ready(self._state)
        return StepResult(float(metrics["loss"]), float(metrics["gradient_norm"]))


def make_rows_step(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, tuple[Batch, ...]], tuple[TrainState, dict[str, Array]]]:
    """A jitted step on groups of micro-batches, `[micro-batches, pairs, ...]` each, with one update for all."""
    gradient = jax.value_and_grad(objective, has_aux=True)

    @partial(jax.jit, donate_argnums=0)
    def rows_step(state: TrainState, groups: tuple[Batch, ...]) -> tuple[TrainState, dict[str, Array]]:
        pairs = sum(group.weights.size for group in groups)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            (loss, _), grads = gradient(state.params, micro)
            share = micro.weights.size / pairs
            return jax.tree.map(lambda x, new: x + share * new, total, (loss, grads)), None

        total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        for group in groups:
            total, _ = jax.lax.scan(add, total, group)
        loss, grads = total
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.global_norm(grads)}
        return TrainState(params, opt_state, state.step + 1), metrics

    return rows_step


def prefix_rows(batch: Batch, micro_batch: int) -> tuple[Batch, ...]:
    """Every pair of prefixes as a pair of its own, in `LENGTHS` groups by length, each padded to its longest.

    A group is `[micro-batches, pairs, ...]`, with `micro_batch` pairs or the next smaller number that divides it.
    """
    rows, _, width = batch.answers.shape
    step = width // LENGTHS
    groups = []
    for longest in range(step, width + 1, step):
        pair = np.tile(np.arange(rows), step)
        lengths = np.repeat(np.arange(longest - step + 1, longest + 1, dtype=np.int32), rows)
        group = Batch(
            batch.prompts[pair],
            batch.prompt_lengths[pair],
            batch.answers[pair, :, :longest],
            np.stack([lengths, lengths], axis=1),
            batch.weights[pair],
        )
        together = max(size for size in range(1, micro_batch + 1) if len(pair) % size == 0)
        groups.append(jax.tree.map(lambda x, together=together: x.reshape(-1, together, *x.shape[1:]), group))
    return tuple(groups)


class TorchTrainer:
    """The same steps in PyTorch, on the same weights."""

    def __init__(self, model: CausalModel, params: Params, dtype: str) -> None:
        import torch

        self._model = torch_twin(model, params)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.b1, OPTIMIZER.b2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
        )
        self._autocast = partial(torch.autocast, torch_device(), getattr(torch, dtype), enabled=dtype != "float32")

    def run(self, batch: Batch, steps: int) -> StepResult:
        """`steps` steps of Bradley-Terry on whole answers."""
        import torch_loops

        return [self._step(torch_loops.full_sequence_loss, batch) for _ in range(steps)][-1]

    def run_rows(self, batch: Batch, micro_batch: int) -> StepResult:
        """One step on every pair of prefixes, each a text of its own."""
        import torch_loops

        return self._step(partial(torch_loops.all_prefix_rows_loss, micro_batch=micro_batch), batch)

    def _step(self, loss_with_backward: Callable[..., Any], batch: Batch) -> StepResult:
        import torch

        texts = [batch.prompts, batch.answers[:, 0], batch.answers[:, 1]]
        self._optimizer.zero_grad()
        with self._autocast():
            loss = loss_with_backward(self._model, *(torch.from_numpy(x).long().to(torch_device()) for x in texts))
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip)
        self._optimizer.step()
        if torch_device() == "cuda":
            torch.cuda.synchronize()
        return StepResult(float(loss), float(norm))


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()  # as train.py does; it serves PyTorch too
    without_torch = "--skip-torch" if args.skip_torch else reason_without_torch()
    print(f"no torch: {without_torch}" if without_torch else "torch beside JAX", flush=True)
    ceilings = measure.ceilings(jnp.dtype(args.dtype))
    model = CausalModel(SHAPES[args.model], "reward")
    host_params = random_params(model, 0, args.params)
    torch_trainer = None if without_torch else TorchTrainer(model, host_params, args.dtype)
    jax_trainer = JaxTrainer(*on_device(model, host_params, unrolled=False), args.dtype)
    del host_params

    speeds, ratios, differences = [], [], {}
    name = args.name or f"train_{args.model}_{args.dtype}_{jax.default_backend()}"
    for pairs in args.batch:
        batch = random_batch(model.config.vocab_size, pairs, args)
        quick, slow = contestants(jax_trainer, torch_trainer, batch, args)
        differences[pairs] = check_agreement({what: run() for what, run in (quick | slow).items()}, args.dtype)
        quick_seconds = per_step(measure.interleaved(quick, args.repeats, warmup=0), args)
        slow_seconds = per_step(measure.interleaved(slow, args.row_repeats, warmup=0), args)
        for what, seconds in (quick_seconds | slow_seconds | quick_seconds).items():
            least = least_seconds(model, what, pairs, args, ceilings)
            speeds.append(speed_row(what, pairs, seconds, least, args))
        reference = BT if torch_trainer is None else TORCH_BT
        ratios += ratio_rows(pairs, quick_seconds, reference, [BT, PARTIAL, PACKED])
        ratios += ratio_rows(pairs, slow_seconds, PARTIAL, [ROWS, TORCH_ROWS])
        # After each batch size, in case the next one does not fit in memory.
        text = report(args, ceilings, differences, without_torch, measure.table(speeds), measure.table(ratios))
        payload = {"settings": vars(args), "ceilings": ceilings, "steps": speeds, "ratios": ratios}
        path = measure.write_result(name, payload, text)
    print(f"{text}\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    summary, description = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="small", help="shape of the reward model")
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32", help="of the matrix products")
    parser.add_argument("--params", choices=AGREEMENT, default="float32", help="of parameters and moments")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="pairs a step")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--micro-batch", type=int, default=32, help="pairs of prefix rows that run together")
    parser.add_argument("--steps", type=int, default=3, help="steps a timed run, but one of prefix rows")
    parser.add_argument("--repeats", type=int, default=21, help="timed runs of bt and partial_bt")
    parser.add_argument("--row-repeats", type=int, default=2, help="timed runs of prefix rows")
    parser.add_argument("--skip-rows", action="store_true", help="leave out prefix rows (they are slow)")
    parser.add_argument("--skip-torch", action="store_true", help="leave out PyTorch")
    parser.add_argument("--name", help="of the result files (default: from model, dtype and platform)")
    args = parser.parse_args()
    if min(*args.batch, args.prompt, args.micro_batch, args.steps, args.repeats, args.row_repeats) < 1:
        parser.error("batch sizes, tokens, steps and repeats must be at least 1")
    if args.answer < LENGTHS or args.answer % LENGTHS:
        parser.error(f"--answer must be a multiple of {LENGTHS} tokens")
    if args.prompt + args.answer > SHAPES[args.model].max_positions:
        parser.error(f"prompt and answer must fit the model's {SHAPES[args.model].max_positions} positions")
    if args.params == "bfloat16" != args.dtype:
        parser.error("--params bfloat16 needs --dtype bfloat16")
    return args


def random_batch(vocab_size: int, pairs: int, args: argparse.Namespace) -> Batch:
    """Pairs of random texts without padding."""
    draw = partial(np.random.default_rng(0).integers, 0, vocab_size, dtype=np.int32)
    return Batch(
        draw((pairs, args.prompt)),
        np.full(pairs, args.prompt, np.int32),
        draw((pairs, 2, args.answer)),
        np.full((pairs, 2), args.answer, np.int32),
        np.ones(pairs, np.float32),
    )


def packed(batch: Batch) -> Batch:
    """The same pairs, one a row: a prompt and then both answers."""
    packing = Packing(batch.prompts.shape[1] + 2 * batch.answers.shape[2])
    return batch._replace(packed=packing.pack(batch.prompts, batch.answers, row_multiple=1))


def contestants(
    ours: JaxTrainer, theirs: TorchTrainer | None, batch: Batch, args: argparse.Namespace
) -> tuple[Runs, Runs]:
    """The steps on whole texts, and `partial_bt` among the steps on prefix rows."""
    quick: Runs = {name: partial(ours.run, name, batch, args.steps) for name in (BT, PARTIAL)}
    quick[PACKED] = partial(ours.run, PARTIAL, packed(batch), args.steps)
    if theirs:
        quick[TORCH_BT] = partial(theirs.run, batch, args.steps)
    if args.skip_rows:
        return quick, {}
    slow: Runs = {PARTIAL: quick[PARTIAL], ROWS: partial(ours.run_rows, prefix_rows(batch, args.micro_batch))}
    if theirs:
        slow[TORCH_ROWS] = partial(theirs.run_rows, batch, args.micro_batch)
    return quick, slow


def check_agreement(results: Mapping[str, StepResult], dtype: str) -> float:
    """The largest relative difference of losses and of gradient norms among steps that compute the same; exits if they
    do not."""
    largest = 0.0
    for reference, others in {BT: [TORCH_BT], PARTIAL: [PACKED, ROWS, TORCH_ROWS]}.items():
        for other in others:
            if other in results:
                differences = np.abs(np.divide(results[other], results[reference]) - 1)
                largest = max(largest, float(differences.max()))
    if not largest <= AGREEMENT[dtype]:
        raise SystemExit(f"losses or gradient norms differ by {largest:.1g} of their size: {results}")
    return largest


def per_step(seconds: Mapping[str, measure.Spread], args: argparse.Namespace) -> dict[str, measure.Spread]:
    """Seconds a step, from those of timed runs."""
    steps = dict.fromkeys(seconds, args.steps) | {ROWS: 1, TORCH_ROWS: 1}
    return {what: spread.scaled(1 / steps[what]) for what, spread in seconds.items()}


def least_seconds(
    model: CausalModel, what: str, pairs: int, args: argparse.Namespace, ceilings: measure.Ceilings
) -> float:
    """The limit of one step."""
    itemsize = jnp.dtype(args.dtype).itemsize
    if what == PACKED:  # a prompt's tokens see themselves; an answer's see the prompt and themselves
        text = args.prompt + 2 * args.answer
        seen = (args.prompt * args.prompt / 2 + 2 * args.answer * (args.prompt + args.answer / 2)) / text + 0.5
        passes = [causal_pass(model, itemsize, queries=pairs * text, seen=seen)]
    else:
        lengths = range(1, args.answer + 1) if what in (ROWS, TORCH_ROWS) else [args.answer]
        texts = [args.prompt + length for length in lengths]
        passes = [causal_pass(model, itemsize, queries=2 * pairs * text, seen=(text + 1) / 2) for text in texts]
    # Weights are read forward and backward, at least once each for all texts.
    gradient = ceilings.least_seconds(2 * passes[0].bytes_read, 3 * sum(work.operations for work in passes))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))
    # AdamW reads the parameters, their gradient, and two moments.
    return gradient + 4 * parameters * jnp.dtype(args.params).itemsize / ceilings.bandwidth


def speed_row(what: str, pairs: int, seconds: measure.Spread, least: float, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "step": what,
        "pairs": pairs,
        "ms a step": seconds.scaled(1e3),
        "others' CPU": "unknown" if seconds.others is None else f"{seconds.others:.0%}",
        "tokens/s": 2 * pairs * (args.prompt + args.answer) / seconds.median,
        "limit, ms": 1e3 * least,
        "share of the limit": least / seconds.median,
    }


def ratio_rows(
    pairs: int, seconds: Mapping[str, measure.Spread], reference: str, others: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "a step of": other,
            "pairs": pairs,
            "takes, in steps of": reference,
            "ratio": seconds[other].over(seconds[reference]),
        }
        for other in others
        if other in seconds and other != reference
    ]


def report(
    args: argparse.Namespace,
    ceilings: measure.Ceilings,
    differences: Mapping[int, float],
    without_torch: str | None,
    speeds: str,
    ratios: str,
) -> str:
    """The result in markdown."""
    notes = [f"PyTorch was left out: {without_torch}."] if without_torch else []
    if not (without_torch and args.skip_rows):
        largest = max(differences.values())
        notes.append(
            f"Losses and gradient norms of steps that compute the same differ by at most {largest:.1g} of theirs."
        )
    notes_text = "\n\n".join(notes)
    return f"""\
# Training: {args.model}, {args.dtype} ({args.params} parameters), prompt {args.prompt}, answers {args.answer}

{speeds}

Time of one step (loss, gradient, clipping, AdamW): median of {args.repeats} runs of {args.steps} steps, for prefix rows
of {args.row_repeats} runs of one (lowest to highest). Tokens are those of the pairs' texts, each counted once however
often a step runs over it, and a prompt with each of its answers. Others' CPU is the share of all cores' time that
other processes had; rounds in which it was
over {measure.MOST_OTHERS:.0%} were dropped where enough others were quiet.

{ratios}

Ratios are taken round by round, between runs that were neighbours in time.

Limit: for the gradient the greater of bytes / {ceilings.bandwidth / 1e9:.1f} GB/s and operations /
{ceilings.matmul / 1e9:.0f} GFLOP/s, then AdamW's bytes; the rates measured on this device for reading and for large
products in {args.dtype}.

{notes_text}
"""


if __name__ == "__main__":
    main()
