"""Readings of the meter: means of metrics, and rates over the time that steps took."""

import time

import numpy as np
import pytest

from pargs_jax.data.batches import Batch, PrefixTexts
from pargs_jax.training.meter import Meter, count_tokens

LENGTHS = np.array([[3, 1], [2, 4]], np.int32)
BATCH = Batch(
    np.zeros((2, 6), np.int32), np.array([2, 5], np.int32), np.zeros((2, 2, 4), np.int32), LENGTHS, np.ones(2)
)


def test_tokens_are_counted_and_not_prefixes():
    assert count_tokens(BATCH) == 2 * (2 + 5) + 10
    prefixes = PrefixTexts(
        np.zeros((2, 2, 9, 4), np.int32), np.zeros((2, 2, 9), np.int32), np.array([[9, 1], [1, 1]], np.int32)
    )
    assert count_tokens(BATCH._replace(prefixes=prefixes)) == count_tokens(BATCH)


def test_readings_are_of_the_time_since_the_last_one_less_pauses(monkeypatch):
    now, waited = [0.0], [0.5]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(lambda: waited[0])
    for loss in (1.0, 3.0):
        meter.add({"loss": np.float32(loss), "reward_min": np.float32(loss)}, tokens=50)
    assert len(meter) == 2
    with meter.paused():
        now[0] += 7
    now[0] += 2
    waited[0] += 1
    steps, values = meter.read()
    assert [step["loss"] for step in steps] == [1, 3] and len(meter) == 0
    assert values == {"loss": 2, "reward_min": 1, "tokens_per_second": 50, "data_wait_share": 0.5}
    meter.add({"loss": np.float32(4)}, tokens=10)
    now[0] += 4
    assert meter.read()[1] == pytest.approx({"loss": 4, "tokens_per_second": 2.5, "data_wait_share": 0})
