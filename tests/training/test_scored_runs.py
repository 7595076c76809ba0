"""Whole runs on scored answers, as a file of one's own and as `decode.py` writes them."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands.train import train
from pargs_jax.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from pargs_jax.errors import InputError
from pargs_jax.models.hf import load_model

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")

PROMPT = "Customer: my lamp broke\nAgent:"
ROWS = [
    {"prompt": PROMPT, "response": " Sorry.", "reward": 1.5},
    {"prompt": PROMPT, "response": " No", "guide_reward": -1, "finish_reason": "length", "sample": 1},
    {"prompt": PROMPT, "response": " No lamp.", "reward": float("nan")},
    {"prompt": PROMPT, "response": " We will see.", "reward": 0.5},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_learns_sets_bad_rows_aside_and_resumes_with_its_own_rewards_alone(lm, tmp_path):
    data = write(tmp_path / "scored.jsonl", ROWS)
    config = TrainConfig(
        model=ModelConfig(init=str(lm)),
        objective=ObjectiveConfig(name="rad"),
        data=DataConfig(train=data, eval=data),
        batch_size=4,
        max_length=64,
        steps=6,
        out=str(tmp_path / "run"),
    )
    printed = io.StringIO()
    folder = train(config, Console(file=printed, width=10_000))
    assert "1 of 4 rows cannot be used; see" in printed.getvalue()
    (bad,) = map(json.loads, (folder / "bad_rows.train.jsonl").read_text().splitlines())
    assert (bad["line"], bad["reason"]) == (3, "reward is nan, must be a finite number")
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "squared_error" in row]
    assert losses and np.isfinite(losses).all()
    assert not load_model(folder / "model", "reward").new_head

    write(tmp_path / "scored.jsonl", [ROWS[0] | {"reward": 2.0}, *ROWS[1:]])
    with pytest.raises(InputError, match="its tokenised rows differ from those"):
        train(dataclasses.replace(config, resume=True, steps=8), Console(quiet=True))
