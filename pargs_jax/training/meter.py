"""Measures training steps: their metrics, and their speed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

from pargs_jax.data.batches import Batch
from pargs_jax.training.objective import Metrics
from pargs_jax.training.step import merge_metrics

SAMPLED = "sampled_tokens"
"""The metric of a step that counts the tokens it has sampled itself."""


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch's texts without padding; a prompt counts once per answer. 0 in a batch of prompts."""
    return int(batch.prompt_lengths.sum()) * batch.answers.shape[1] + int(batch.answer_lengths.sum())


def stack_metrics(parts: list[Metrics]) -> dict[str, np.ndarray]:
    """Metrics of several batches; each becomes an array with one entry per batch."""
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


class Meter:
    """Collects the metrics of steps; only reading them waits for the device.

    Besides the metrics' means, a reading has `tokens_per_second` (those of the batches, and those that steps sampled)
    and `data_wait_share`, over the time since the last reading without pauses. `data_wait_share` is the share of that
    time (0 to 1) that the loop waited for batches. Steps are dispatched asynchronously, so it is an upper bound on the
    share that the device was idle for lack of data.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        """`waited` returns the total seconds that the loop has waited for batches."""
        self._waited_in_all = waited
        self._steps: list[Metrics] = []
        self._start_again()

    def __len__(self) -> int:
        """The number of steps since the last reading."""
        return len(self._steps)

    def add(self, metrics: Metrics, tokens: int) -> None:
        """Adds a step, which may still be running, and the number of tokens in its batch."""
        self._steps.append(metrics)
        self._tokens += tokens

    def read(self) -> tuple[list[Metrics], dict[str, float]]:
        """The metrics of each step since the last reading, and their means with the rates. Waits for the device."""
        steps = jax.device_get(self._steps)
        means = merge_metrics(stack_metrics(steps), np.ones(len(steps)))
        seconds = time.perf_counter() - self._since
        tokens = self._tokens + sum(int(step.get(SAMPLED, 0)) for step in steps)
        rates = {
            "tokens_per_second": tokens / seconds,
            "data_wait_share": (self._waited_in_all() - self._waited) / seconds,
        }
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
        self._tokens, self._waited, self._since = 0, self._waited_in_all(), time.perf_counter()
