"""The training loop: steps, progress, metrics, evaluation, checkpoints."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from rich.console import Console

from pargs_jax.config import TrainConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.errors import InputError
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import Params
from pargs_jax.objectives import FRACTIONS, Metrics
from pargs_jax.progress import ShownProgress
from pargs_jax.sharding import current_mesh, on_every_device, place_rows, place_whole
from pargs_jax.signals import signals_wait
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.interrupts import agreed
from pargs_jax.training.metrics_log import MetricsLog
from pargs_jax.training.objective import Objective
from pargs_jax.training.prefetch import Prefetch
from pargs_jax.training.step import StepFunction, TrainState, merge_metrics


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch's texts, padding left out; a prompt counts once with each answer."""
    return int(batch.prompt_lengths.sum()) * batch.answers.shape[1] + int(batch.answer_lengths.sum())


def evaluate(objective: Objective, params: Params, batches: Batches) -> dict[str, float]:
    """Loss and metrics over every row of an evaluation set."""
    parts = []
    for batch in batches.evaluation():
        loss, (metrics, weight) = _evaluation_step(objective, params, place_rows(current_mesh(), batch))
        parts.append(metrics | {"loss": loss, "weight": weight})
    stacked = _stack(jax.device_get(parts))  # waits for the device once, not for every batch
    weights = stacked.pop("weight")
    return {name: float(value) for name, value in merge_metrics(stacked, weights).items()}


@partial(jax.jit, static_argnums=0)
def _evaluation_step(objective: Objective, params: Params, batch: Batch) -> Any:
    return on_every_device(objective(params, batch))


def run_steps(
    config: TrainConfig,
    state: TrainState,
    frozen: Params,
    step: StepFunction,
    objective: Objective,
    schedule: Callable[[int], Any],
    batches: Batches,
    held_out: Batches | None,
    checkpoints: Checkpoints,
    total: int,
    console: Console,
) -> TrainState:
    """Runs from `state.step` to `total`; Ctrl-C and SIGTERM end it after the running step, which is saved.

    When it returns, the last step's checkpoint is whole.

    Of a report, `tokens_per_second` and `data_wait_share` are over the time since the last one, less evaluations. The
    latter is the share of it, 0 to 1, that the loop waited for batches. Steps run behind the loop's back, so a device
    stood idle for want of data for at most that share.

    Raises InputError when the loss, the gradient or the state is no longer finite, or the loss is beyond `loss_limit`,
    with the checkpoints left as they were, and when something cannot be written.
    """
    first = int(state.step)
    mesh = current_mesh()
    key = place_whole(mesh, lambda: jax.random.key(config.seed))
    waiting: list[Metrics] = []
    tokens, waited, since = 0, 0.0, time.perf_counter()
    largest_loss: float | None = None

    def report(number: int) -> dict[str, float]:
        """Fetches the metrics of the steps since the last report, which waits for the device."""
        nonlocal tokens, waited, since, largest_loss
        fetched = jax.device_get(waiting)
        waiting.clear()
        if largest_loss is None:
            largest_loss = (config.loss_limit or math.inf) * max(objective.loss_of_chance, fetched[0]["loss"])
        for step_number, values in enumerate(fetched, number - len(fetched) + 1):
            if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
                what = f"the loss is {values['loss']:g} and the gradient norm {values['gradient_norm']:g}"
                raise _diverged(step_number, what, checkpoints)
            if values["loss"] > largest_loss:
                what = f"the loss is {values['loss']:g}, and no step's may be over {largest_loss:g} (--loss-limit)"
                raise _diverged(step_number, what, checkpoints)
        count = len(fetched)
        values = {k: float(v) for k, v in merge_metrics(_stack(fetched), np.ones(count)).items()}
        now = time.perf_counter()
        values |= {
            "learning_rate": float(schedule(number - 1)),
            "tokens_per_second": tokens / (now - since),
            "data_wait_share": (prefetch.waited - waited) / (now - since),
        }
        tokens, waited, since = 0, prefetch.waited, now
        log.write(number, "train", values)
        return values

    def evaluated(number: int) -> dict[str, float]:
        nonlocal since
        paused = time.perf_counter()
        values = evaluate(objective, join_params(state.params, frozen), held_out)
        if not math.isfinite(values["loss"]):
            raise _diverged(number, f"the held-out loss is {values['loss']:g}", checkpoints)
        log.write(number, "eval", values)
        console.print(f"step {number}: {_describe_evaluation(values)}", highlight=False)
        since += time.perf_counter() - paused
        return values

    def save(number: int, metrics: dict[str, float] | None) -> None:
        """Saves what is good to go on from: an update may overflow after a loss and a gradient that did not."""
        if not _is_finite((state.params, state.opt_state)):
            raise _diverged(number, "its update made weights or optimizer state that are not finite", checkpoints)
        checkpoints.save(state, metrics)

    def say_stopped(number: int) -> None:
        console.print(
            f"stopped; step {number} of {total} is saved in {checkpoints.folder}; go on with --resume", highlight=False
        )

    def load(index: int) -> tuple[Batch, int]:
        batch = batches.batch(index)
        return place_rows(mesh, batch), count_tokens(batch)

    with (
        MetricsLog(config, first) as log,
        ShownProgress(console, "training", total, first) as progress,
        signals_wait() as stop,
        Prefetch(load, range(first, total)) as prefetch,
    ):
        try:
            for number, (batch, count) in enumerate(prefetch, first + 1):
                state, metrics = step(state, batch, key, frozen)
                waiting.append(metrics)
                tokens += count
                is_last = number == total
                evaluates = held_out is not None and (is_last or _due(number, config.eval_every))
                saves = is_last or _due(number, config.save_every)
                reports = is_last or evaluates or saves or _due(number, config.log_every)
                if reports:  # which waits for the device: what is shown as done is done
                    progress.update(number, _describe_steps(report(number)))
                evaluation = evaluated(number) if evaluates else None
                if saves or (evaluation is not None and checkpoints.is_best(evaluation)):
                    save(number, evaluation)
                if (ending := agreed(stop, reports)) is not None:
                    raise ending
            checkpoints.wait()  # for the last save: until it is whole, no signal may end the process
        except KeyboardInterrupt:
            if not stop.at_once:
                number = int(state.step)
                if waiting:
                    report(number)
                save(number, None)
                checkpoints.wait()
                say_stopped(number)
            raise
    if (ending := agreed(stop, True)) is not None:  # one that came after the last step
        say_stopped(total)
        raise ending
    return state


@jax.jit
def _is_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of a tree are finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _stack(parts: list[Metrics]) -> dict[str, np.ndarray]:
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


def _diverged(step: int, what: str, checkpoints: Checkpoints) -> InputError:
    return InputError(
        f"step {step}: {what}; {checkpoints.kept}; "
        "a lower --optim.lr or --optim.clip, or a longer --optim.warmup may help"
    )


def _describe_steps(values: dict[str, float]) -> str:
    accuracy = f"  accuracy {values['accuracy']:.3f}" if "accuracy" in values else ""
    return f"loss {values['loss']:.4f}{accuracy}  {values['tokens_per_second']:,.0f} tokens/s"


def _describe_evaluation(values: dict[str, float]) -> str:
    text = f"held out: loss {values['loss']:.4f}, accuracy {values['accuracy']:.3f}"
    if "margin" not in values:
        return text
    prefixes = " ".join(f"{values[f'accuracy_{percent}']:.3f}" for percent in FRACTIONS)
    return f"{text} (at {'/'.join(map(str, FRACTIONS))} % of the answer: {prefixes})"
