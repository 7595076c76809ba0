"""Objectives that train a language model, from the command's options to answers of the exported model."""

import dataclasses
import io
import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from pargs_jax.commands import doors
from pargs_jax.commands import train as command
from pargs_jax.config import DataConfig, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from pargs_jax.data.batches import Batches, tokenise
from pargs_jax.data.preferences import Preference
from pargs_jax.models.hf import load_model
from pargs_jax.objectives.dpo import DirectPreference
from pargs_jax.testing import tiny_tokenizer
from pargs_jax.training.loop import evaluate
from pargs_jax.training.objective import Objective

pytestmark = pytest.mark.usefixtures("compiled_steps_are_reused")


@pytest.fixture
def settings(lm, tmp_path):
    """Makes a config of a short run on eight pairs, with what the arguments change."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Customer: my {word} broke\nAgent:", "chosen": f" Sorry, {word} sent.", "rejected": f" No {word}."}
        for word in ("lamp", "kettle", "chair", "phone", "table", "radio", "clock", "fan")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial(
        TrainConfig,
        steps=6,
        batch_size=4,
        max_length=48,
        log_every=1,
        model=ModelConfig(init=str(lm)),
        data=DataConfig(train=str(path), eval=str(path)),
        optim=OptimConfig(lr=3e-3, schedule="constant", warmup=0.0),
        out=str(tmp_path / "run"),
    )


def train(config):
    """Runs it, and returns the losses of its steps and what was last evaluated."""
    command.train(config, Console(file=io.StringIO()))
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"], lines[-1]


def decode(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, words)])
    doors.decode()


def test_an_autoregressive_reward_model_guides_genarm(settings, lm, tmp_path, monkeypatch):
    config = settings(objective=ObjectiveConfig(name="arm", beta=0.5))
    losses, evaluation = train(config)
    assert losses[-1] < losses[0] and evaluation["accuracy"] > 0.9 and "accuracy_10" in evaluation
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "Customer: my lamp broke\nAgent:"}) + "\n")
    options = ("--method", "genarm", "--max-new-tokens", 4, "--prompts", prompts, "--out", out)
    decode(monkeypatch, "--lm", lm, "--rm", config.out, *options)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["id"] == "a" and 0 < row["tokens"] <= 4 and row["kl"] > 0 and row["guide_reward"] < 0


@pytest.mark.parametrize("rank", [0, 2])
def test_dpo_moves_away_from_the_model_that_it_starts_from(settings, lm, tmp_path, rank):
    """Which is the reference after a restart too."""
    lora = LoraConfig(rank=rank)
    config = settings(objective=ObjectiveConfig(name="dpo"), lora=lora, save_every=3)
    losses, evaluation = train(config)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0]
    first = dataclasses.replace(config, steps=3, out=str(tmp_path / "stopped"))
    train(first)
    resumed, found = train(dataclasses.replace(first, steps=6, resume=True))
    assert resumed == losses and found["loss"] == evaluation["loss"]

    tuned, before = load_model(f"{config.out}/model", "vocabulary"), load_model(lm, "vocabulary")
    assert tuned.params.keys() == before.params.keys()
    tokenizer = tiny_tokenizer()
    lines = Path(config.data.train).read_text().splitlines()
    rows = [Preference(id=str(i), **json.loads(line)) for i, line in enumerate(lines)]
    examples, _ = tokenise(rows, tokenizer, config.max_length, 2)
    objective = Objective(tuned.model, DirectPreference(), frozen=(("reference", before.model),))
    exported = evaluate(objective, {**tuned.params, "reference": before.params}, Batches(examples, 4, 48, 0))
    assert exported["loss"] == pytest.approx(evaluation["loss"], rel=1e-4)
    assert exported["margin"] == pytest.approx(evaluation["margin"], rel=1e-3)
    if rank:
        adapted = load_model(f"{config.out}/adapter", "vocabulary").params
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), adapted, tuned.params)
