"""The training loop: steps, progress, metrics, evaluation, checkpoints."""

import dataclasses
import math
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
from rich.console import Console

from pargs_jax.config import TrainConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.errors import InputError
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import Params
from pargs_jax.objectives.bradley_terry import FRACTIONS
from pargs_jax.processes import largest
from pargs_jax.progress import ShownProgress
from pargs_jax.sharding import current_mesh, on_every_device, place_rows, place_whole
from pargs_jax.signals import ERRORS, StopRequest, signals_wait
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.meter import BatchSize, Meter, size_of, stack_metrics
from pargs_jax.training.metrics_log import MetricsLog
from pargs_jax.training.objective import Metrics, Objective
from pargs_jax.training.prefetch import Prefetch
from pargs_jax.training.step import StepFunction, TrainState, merge_metrics


def evaluate(objective: Objective, params: Params, batches: Batches) -> dict[str, float]:
    """Mean loss and metrics over every row of an evaluation set."""
    parts = []
    for batch in batches.evaluation():
        loss, (metrics, weight) = _evaluation_step(objective, params, place_rows(current_mesh(), batch))
        parts.append(metrics | {"loss": loss, "weight": weight})
    stacked = stack_metrics(jax.device_get(parts))  # waits for the device once, not once per batch
    weights = stacked.pop("weight")
    return {name: float(value) for name, value in merge_metrics(stacked, weights).items()}


@partial(jax.jit, static_argnums=0)
def _evaluation_step(objective: Objective, params: Params, batch: Batch) -> Any:
    return on_every_device(objective(params, batch))


@dataclasses.dataclass
class Trainer:
    """Takes a run from a state to its last step. Ctrl-C and SIGTERM stop it after the running step, and save that
    state.

    Attributes:
        config: the run's options.
        total: the number of steps.
        step, schedule: the jitted step, and the learning rate by step.
        objective, frozen: the objective, and the parameters that are not trained.
        batches: the training batches.
        evaluate: the held-out loss and metrics of all parameters together, if there are rows for it.
        checkpoints: where states are saved.
        console: prints progress and evaluations.
    """

    config: TrainConfig
    total: int
    step: StepFunction
    schedule: Callable[[int], Any]
    objective: Objective
    frozen: Params
    batches: Batches
    evaluate: Callable[[Params], dict[str, float]] | None
    checkpoints: Checkpoints
    console: Console

    def run(self, state: TrainState) -> TrainState:
        """Returns the state after the last step, once its checkpoint is complete; the given state is donated.

        Raises InputError if the loss, the gradient or the state is no longer finite, or if the loss exceeds
        `loss_limit`; checkpoints are then left unchanged. Also raises InputError if something cannot be written.
        """
        first, mesh = int(state.step), current_mesh()
        key = place_whole(mesh, lambda: jax.random.key(self.config.seed))
        self._state, self._largest_loss = state, None

        def load(index: int) -> tuple[Batch, BatchSize]:
            batch = self.batches.batch(index)
            return place_rows(mesh, batch), size_of(batch)

        with (
            MetricsLog(self.config, first) as self._log,
            ShownProgress(self.console, "training", self.total, first) as progress,
            signals_wait() as stop,
            Prefetch(load, range(first, self.total)) as prefetch,
        ):
            self._meter = Meter(lambda: prefetch.waited)
            try:
                for number, (batch, size) in enumerate(prefetch, first + 1):
                    self._state, metrics = self.step(self._state, batch, key, self.frozen)
                    self._meter.add(metrics, size)
                    reports = self._after_step(number, progress)
                    if (ending := agreed(stop, reports)) is not None:
                        raise ending
                self.checkpoints.wait()  # until the last save is complete, no signal may end the process
            except KeyboardInterrupt:
                if not stop.at_once:
                    self._stop()
                raise
        if (ending := agreed(stop, True)) is not None:  # a signal that came after the last step
            self._say_stopped(self.total)
            raise ending
        return self._state

    def _after_step(self, number: int, progress: ShownProgress) -> bool:
        """Reports, evaluates and saves where due; returns whether anything was reported."""
        config, is_last = self.config, number == self.total
        evaluates = self.evaluate is not None and (is_last or _due(number, config.eval_every))
        saves = is_last or _due(number, config.save_every)
        reports = is_last or evaluates or saves or _due(number, config.log_every)
        if reports:  # waits for the device, so the shown step is really finished
            progress.update(number, _describe_steps(self._report(number)))
        evaluation = self._evaluate(number) if evaluates else None
        if saves or (evaluation is not None and self.checkpoints.is_best(evaluation)):
            self._save(number, evaluation)
        return reports

    def _report(self, number: int) -> dict[str, float]:
        """Logs the steps since the last report; the last of them is `number`."""
        steps, values = self._meter.read()
        if self._largest_loss is None:
            limit = self.config.loss_limit or math.inf
            self._largest_loss = limit * max(self.objective.loss_of_chance, steps[0]["loss"])
        for step_number, metrics in enumerate(steps, number - len(steps) + 1):
            self._check(step_number, metrics)
        values = values | {"learning_rate": float(self.schedule(number - 1))}
        self._log.write(number, "train", values)
        return values

    def _check(self, number: int, metrics: Metrics) -> None:
        """Raises InputError if a step's metrics show that the run has diverged."""
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(number, f"the loss is {loss:g} and the gradient norm is {norm:g}")
        if loss > self._largest_loss:
            raise self._diverged(number, f"the loss is {loss:g}, over the limit of {self._largest_loss:g} (loss_limit)")

    def _evaluate(self, number: int) -> dict[str, float]:
        with self._meter.paused():
            values = self.evaluate(join_params(self._state.params, self.frozen))
            if not math.isfinite(values["loss"]):
                raise self._diverged(number, f"the held-out loss is {values['loss']:g}")
            self._log.write(number, "eval", values)
            self.console.print(f"step {number}: {_describe_evaluation(values)}", highlight=False)
        return values

    def _save(self, number: int, evaluation: dict[str, float] | None) -> None:
        """Saves the state if it is finite: an update may overflow although its loss and gradient were finite."""
        if not _is_finite((self._state.params, self._state.opt_state)):
            raise self._diverged(number, "its update made weights or optimizer state infinite or NaN")
        self.checkpoints.save(self._state, evaluation)

    def _stop(self) -> None:
        """Stops an interrupted run: reports and saves the steps so far."""
        number = int(self._state.step)
        if len(self._meter):
            self._report(number)
        self._save(number, None)
        self.checkpoints.wait()
        self._say_stopped(number)

    def _say_stopped(self, number: int) -> None:
        self.console.print(
            f"stopped; step {number} of {self.total} is saved in {self.checkpoints.folder}; resume the run to continue",
            highlight=False,
        )

    def _diverged(self, step: int, what: str) -> InputError:
        return InputError(
            f"step {step}: {what}; {self.checkpoints.safe_state}; "
            "try a lower optim.lr, a lower optim.clip or a longer optim.warmup"
        )


def agreed(request: StopRequest, now: bool) -> type[KeyboardInterrupt] | None:
    """What to raise after this step, if anything: KeyboardInterrupt for Ctrl-C, Terminated for SIGTERM.

    If one of several processes was asked to stop, all stop after the same step: the next one at which all of them call
    this with `now`.
    """
    number = request.number or 0
    if jax.process_count() > 1:
        if not now:
            return None
        number = largest(number)
    return ERRORS[signal.Signals(number)] if number else None


@jax.jit
def _is_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of a tree are finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


SHOWN = ("accuracy", "reward", "kl")
"""Metrics that are shown during training, of those that an objective has."""


def _describe_steps(values: dict[str, float]) -> str:
    more = "".join(f"  {name} {values[name]:.3f}" for name in SHOWN if name in values)
    if "padding_share" in values:
        more += f"  padding {100 * values['padding_share']:.0f} %"
    return f"loss {values['loss']:.4f}{more}  {values['tokens_per_second']:,.0f} tokens/s"


def _describe_evaluation(values: dict[str, float]) -> str:
    more = "".join(f", {name} {values[name]:.3f}" for name in SHOWN if name in values)
    text = f"held out: loss {values['loss']:.4f}{more}"
    if f"accuracy_{FRACTIONS[0]}" not in values:
        return text
    prefixes = " ".join(f"{values[f'accuracy_{percent}']:.3f}" for percent in FRACTIONS)
    return f"{text} (at {'/'.join(map(str, FRACTIONS))} % of the answer: {prefixes})"
