"""Measures training steps: their metrics, and their speed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np

from pargs_jax.data.batches import Batch
from pargs_jax.training.objective import Metrics
from pargs_jax.training.step import merge_metrics

SAMPLED = "sampled_tokens"
"""The metric of a step that counts the tokens it has sampled itself."""


class BatchSize(NamedTuple):
    """The size of a batch; all 0 for a batch of prompts.

    Attributes:
        tokens: tokens of its texts; a prompt counts once per answer, whether or not it is packed.
        slots: token slots that a pass reads, and how many of them are `padding`.
    """

    tokens: int
    slots: int
    padding: int


def size_of(batch: Batch) -> BatchSize:
    """The size of a batch on the host."""
    count = batch.answers.shape[1]
    tokens = int(batch.prompt_lengths.sum()) * count + int(batch.answer_lengths.sum())
    if batch.packed is not None:
        return BatchSize(tokens, batch.packed.tokens.size, int((batch.packed.segments < 0).sum()))
    slots = batch.prompts.size * count + batch.answers.size
    return BatchSize(tokens, slots, slots - tokens)


def stack_metrics(parts: list[Metrics]) -> dict[str, np.ndarray]:
    """Metrics of several batches; each becomes an array with one entry per batch."""
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


class Meter:
    """Collects the metrics of steps; only reading them waits for the device.

    Besides the metrics' means, a reading has `tokens_per_second` (those of the batches, and those that steps sampled)
    and `data_wait_share`, over the time since the last reading without pauses. `data_wait_share` is the share of that
    time (0 to 1) that the loop waited for batches. Steps are dispatched asynchronously, so it is an upper bound on the
    share that the device was idle for lack of data. `padding_share` is the share of the batches' slots that hold no
    token; batches of prompts have none.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        """`waited` returns the total seconds that the loop has waited for batches."""
        self._waited_in_all = waited
        self._steps: list[Metrics] = []
        self._start_again()

    def __len__(self) -> int:
        """The number of steps since the last reading."""
        return len(self._steps)

    def add(self, metrics: Metrics, size: BatchSize) -> None:
        """Adds a step, which may still be running, and the size of its batch."""
        self._steps.append(metrics)
        self._sizes.append(size)

    def read(self) -> tuple[list[Metrics], dict[str, float]]:
        """The metrics of each step since the last reading, and their means with the rates. Waits for the device."""
        steps = jax.device_get(self._steps)
        means = merge_metrics(stack_metrics(steps), np.ones(len(steps)))
        seconds = time.perf_counter() - self._since
        read, slots, padding = map(sum, zip(*self._sizes, strict=True))
        tokens = read + sum(int(step.get(SAMPLED, 0)) for step in steps)
        rates = {
            "tokens_per_second": tokens / seconds,
            "data_wait_share": (self._waited_in_all() - self._waited) / seconds,
        }
        if slots:
            rates["padding_share"] = padding / slots
        self._steps.clear()
        self._start_again()
        return steps, {name: float(value) for name, value in means.items()} | rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of a block from the rates."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _start_again(self) -> None:
        self._sizes: list[BatchSize] = []
        self._waited, self._since = self._waited_in_all(), time.perf_counter()
