"""The training loop: steps, progress, metrics, evaluation, checkpoints."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pargs_jax.config import TrainConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.errors import InputError
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import Params
from pargs_jax.objectives import FRACTIONS, Metrics
from pargs_jax.sharding import current_mesh, place_rows, place_whole
from pargs_jax.training.checkpoint import Checkpoints
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import StepFunction, TrainState, merge_metrics


class MetricsFile:
    """`metrics.jsonl`: one line a report; a resumed run goes on after its checkpoint's step."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._path = path

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")


def count_tokens(batch: Batch) -> int:
    """Real tokens that a model reads of a batch; a prompt is read once with each answer."""
    return int(batch.prompt_lengths.sum()) * batch.answers.shape[1] + int(batch.answer_lengths.sum())


def evaluate(objective: Objective, params: Params, batches: Batches) -> dict[str, float]:
    """Loss and metrics over every row of an evaluation set."""
    parts, weights = [], []
    for batch in batches.evaluation():
        loss, (metrics, weight) = _evaluation_step(objective, params, place(batch))
        parts.append(jax.device_get(metrics | {"loss": loss}))
        weights.append(float(weight))
    stacked = {name: np.array([part[name] for part in parts]) for name in parts[0]}
    return {name: float(value) for name, value in merge_metrics(stacked, np.array(weights)).items()}


_evaluation_step = jax.jit(Objective.__call__, static_argnums=0)


def place(batch: Batch) -> Batch:
    """The batch on the mesh, if one is set."""
    mesh = current_mesh()
    return batch if mesh is None else place_rows(mesh, batch)


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
    """Runs from `state.step` to `total`; a Ctrl-C saves first. Raises InputError when the loss is no longer a number,
    with the checkpoints left as they were."""
    first = int(state.step)
    metrics_file = MetricsFile(config.output_folder / "metrics.jsonl", first)
    mesh = current_mesh()
    key = jax.random.key(config.seed) if mesh is None else place_whole(mesh, lambda: jax.random.key(config.seed))
    waiting: list[Metrics] = []
    tokens, since = 0, time.perf_counter()

    def report(number: int) -> dict[str, float]:
        """Fetches the metrics of the steps since the last report, which waits for the device."""
        nonlocal tokens, since
        fetched = jax.device_get(waiting)
        waiting.clear()
        for back, values in enumerate(reversed(fetched)):
            if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
                raise _diverged(number - back, values, checkpoints)
        count = len(fetched)
        values = {k: float(v) for k, v in merge_metrics(_stack(fetched), np.ones(count)).items()}
        now = time.perf_counter()
        values |= {"learning_rate": float(schedule(number - 1)), "tokens_per_second": tokens / (now - since)}
        tokens, since = 0, now
        metrics_file.write(number, "train", values)
        return values

    def evaluated(number: int) -> None:
        nonlocal since
        paused = time.perf_counter()
        values = evaluate(objective, join_params(state.params, frozen), held_out)
        metrics_file.write(number, "eval", values)
        console.print(f"step {number}: {_describe_evaluation(values)}", highlight=False)
        since += time.perf_counter() - paused

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, _interrupts_wait() as asked:
        task = progress.add_task("training", total=total, completed=first, note="compiling")
        try:
            for number in range(first + 1, total + 1):
                batch = batches.batch(number - 1)
                state, metrics = step(state, place(batch), key, frozen)
                waiting.append(metrics)
                tokens += count_tokens(batch)
                is_last = number == total
                evaluates = held_out is not None and (is_last or _due(number, config.eval_every))
                saves = is_last or _due(number, config.save_every)
                if is_last or evaluates or saves or _due(number, config.log_every):
                    values = report(number)
                    note = f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}"
                    progress.update(task, note=f"{note}  {values['tokens_per_second']:,.0f} tokens/s")
                progress.update(task, completed=number)
                if evaluates:
                    evaluated(number)
                if saves:
                    checkpoints.save(state)
                if asked:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if waiting:
                report(int(state.step))
            checkpoints.save(state)
            console.print(f"stopped and saved at step {int(state.step)}; go on with --resume", highlight=False)
            raise
    return state


@contextmanager
def _interrupts_wait() -> Iterator[list[int]]:
    """Collects Ctrl-C in a list, so that a running step ends first (its input is donated: there is nothing to go back
    to). A second one stops at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _stack(parts: list[Metrics]) -> dict[str, np.ndarray]:
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


def _diverged(step: int, values: Metrics, checkpoints: Checkpoints) -> InputError:
    saved = checkpoints.latest_step
    kept = f"the checkpoint of step {saved} is kept" if saved is not None else "no checkpoint was written yet"
    return InputError(
        f"step {step}: the loss is {values['loss']:g} and the gradient norm {values['gradient_norm']:g}; {kept}; "
        "a lower --optim.lr or --optim.clip, or a longer --optim.warmup may help"
    )


def _describe_evaluation(values: dict[str, float]) -> str:
    text = f"held out: loss {values['loss']:.4f}, accuracy {values['accuracy']:.3f}"
    if "margin" not in values:
        return text
    prefixes = " ".join(f"{values[f'accuracy_{percent}']:.3f}" for percent in FRACTIONS)
    return f"{text} (at {'/'.join(map(str, FRACTIONS))} % of the answer: {prefixes})"
