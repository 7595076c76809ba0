"""What steps came to: their metrics, and how fast they went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np

from pargs_jax.data.batches import Batch
from pargs_jax.training.objective import Metrics
from pargs_jax.training.step import merge_metrics


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch's texts, padding left out; a prompt counts once with each answer."""
    return int(batch.prompt_lengths.sum()) * batch.answers.shape[1] + int(batch.answer_lengths.sum())


def stack_metrics(parts: list[Metrics]) -> dict[str, np.ndarray]:
    """Metrics of several batches, each as an array with one entry a batch."""
    return {name: np.array([part[name] for part in parts]) for name in parts[0]}


class Meter:
    """Gathers the metrics of steps without waiting for the device, until they are read.

    Readings have, beside the metrics' means, `tokens_per_second` and `data_wait_share`, over the time since the last
    reading less pauses. The latter is the share of it, 0 to 1, that the loop waited for batches. Steps are dispatched
    asynchronously, so it is an upper bound on the share that the device was idle for want of data.
    """

    def __init__(self, waited: Callable[[], float]) -> None:
        """`waited` gives the seconds that the loop has waited for batches, up to now."""
        self._waited_in_all = waited
        self._steps: list[Metrics] = []
        self._start_again()

    def __len__(self) -> int:
        """Steps since the last reading."""
        return len(self._steps)

    def add(self, metrics: Metrics, tokens: int) -> None:
        """Notes a step, which may still be running, and the tokens of its batch."""
        self._steps.append(metrics)
        self._tokens += tokens

    def read(self) -> tuple[list[Metrics], dict[str, float]]:
        """The metrics of each step since the last reading, and their means with the rates. Waits for the device."""
        steps = jax.device_get(self._steps)
        means = merge_metrics(stack_metrics(steps), np.ones(len(steps)))
        seconds = time.perf_counter() - self._since
        rates = {
            "tokens_per_second": self._tokens / seconds,
            "data_wait_share": (self._waited_in_all() - self._waited) / seconds,
        }
        self._steps.clear()
        self._start_again()
        return steps, {name: float(value) for name, value in means.items()} | rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a block out of the rates."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def _start_again(self) -> None:
        self._tokens, self._waited, self._since = 0, self._waited_in_all(), time.perf_counter()
