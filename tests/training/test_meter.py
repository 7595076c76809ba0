"""Readings of the meter: means of metrics, and rates over the time that steps took."""

import time

import numpy as np
import pytest

from pargs_jax.data.batches import Batch, PrefixTexts
from pargs_jax.data.packing import Packing
from pargs_jax.training.meter import BatchSize, Meter, size_of

LENGTHS = np.array([[3, 1], [2, 4]], np.int32)
BATCH = Batch(
    np.zeros((2, 6), np.int32), np.array([2, 5], np.int32), np.zeros((2, 2, 4), np.int32), LENGTHS, np.ones(2)
)


def test_tokens_are_counted_and_not_prefixes():
    assert size_of(BATCH) == (2 * (2 + 5) + 10, 2 * 2 * (6 + 4), 40 - 24)
    prefixes = PrefixTexts(
        np.zeros((2, 2, 9, 4), np.int32), np.zeros((2, 2, 9), np.int32), np.array([[9, 1], [1, 1]], np.int32)
    )
    assert size_of(BATCH._replace(prefixes=prefixes)) == size_of(BATCH)


def test_packed_batches_have_the_same_tokens_in_fewer_slots():
    texts = [np.ones(2), np.ones(5)], [[np.ones(3), np.ones(1)], [np.ones(2), np.ones(4)]]
    packed = BATCH._replace(packed=Packing(11).pack(*texts, row_multiple=1))
    assert size_of(packed) == (24, 2 * 11, 22 - 2 - 5 - 10)


def test_batches_of_prompts_have_no_padding_share(monkeypatch):
    prompts = BATCH._replace(answers=np.zeros((2, 0, 0), np.int32), answer_lengths=np.zeros((2, 0), np.int32))
    meter = Meter(lambda: 0.0)
    meter.add({"loss": np.float32(1), "sampled_tokens": np.int32(7)}, size_of(prompts))
    _, values = meter.read()
    assert "padding_share" not in values and values["tokens_per_second"] > 0


def test_readings_are_of_the_time_since_the_last_one_less_pauses(monkeypatch):
    now, waited = [0.0], [0.5]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(lambda: waited[0])
    for loss in (1.0, 3.0):
        meter.add(
            {"loss": np.float32(loss), "reward_min": np.float32(loss)}, BatchSize(tokens=50, slots=80, padding=30)
        )
    assert len(meter) == 2
    with meter.paused():
        now[0] += 7
    now[0] += 2
    waited[0] += 1
    steps, values = meter.read()
    assert [step["loss"] for step in steps] == [1, 3] and len(meter) == 0
    rates = {"tokens_per_second": 50, "data_wait_share": 0.5, "padding_share": 60 / 160}
    assert values == {"loss": 2, "reward_min": 1, **rates}
    meter.add({"loss": np.float32(4)}, BatchSize(tokens=10, slots=40, padding=30))
    now[0] += 4
    rates = {"tokens_per_second": 2.5, "data_wait_share": 0, "padding_share": 30 / 40}
    assert meter.read()[1] == pytest.approx({"loss": 4, **rates})
