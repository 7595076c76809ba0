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
from pargs_jax.data.batches import Batches
from pargs_jax.data.examples import tokenise
from pargs_jax.data.preferences import Preference
from pargs_jax.errors import InputError
from pargs_jax.models.hf import load_model
from pargs_jax.objectives.dpo import DirectPreference
from pargs_jax.objectives.sft import SupervisedFineTuning
from pargs_jax.sharding import map_paths
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


@pytest.mark.parametrize("objective", ["dpo", "farma"])
def test_additions_to_embeddings_and_head_are_resumed_and_exported(settings, lm, tmp_path, objective):
    """On two devices, the same as on one; only the chosen matrices change."""
    lora = LoraConfig(rank=2, layers="value|embed|head")
    config = settings(objective=ObjectiveConfig(name=objective), lora=lora, save_every=3, mesh="cpu-2")
    losses, evaluation = train(config)
    assert losses[-1] < losses[0]
    first = dataclasses.replace(config, steps=3, out=str(tmp_path / "stopped"))
    train(first)
    resumed, found = train(dataclasses.replace(first, steps=6, resume=True))
    assert resumed == losses and found["loss"] == evaluation["loss"]
    alone, _ = train(dataclasses.replace(config, mesh="cpu-1", out=str(tmp_path / "alone")))
    np.testing.assert_allclose(alone, losses, rtol=1e-4)

    head = "table" if objective == "farma" else "vocabulary"
    before = load_model(lm, "vocabulary").params
    tuned, stopped = (load_model(f"{folder}/model", head) for folder in (config.out, first.out))
    jax.tree.map(np.testing.assert_array_equal, tuned.params, stopped.params)
    changed = []
    map_paths(lambda path, a, b: changed.append(path) if (a != b).any() else None, tuned.params, before)
    assert changed == ["backbone.embed.embedding", "backbone.layers.value.kernel", "head.linear.kernel"]
    if head == "table":  # PEFT has no place for it
        assert not Path(config.out, "adapter").exists()
    else:
        adapted = load_model(f"{config.out}/adapter", head).params
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), adapted, tuned.params)


def test_an_addition_to_a_tied_table_is_merged_once_and_has_no_adapter(settings, save_tiny):
    config = settings(
        model=ModelConfig(init=save_tiny("vocabulary", family="qwen3")), objective=ObjectiveConfig(name="sft")
    )
    printed = io.StringIO()
    config = dataclasses.replace(config, lora=LoraConfig(rank=2, layers="embed"))
    command.train(config, Console(file=printed, width=10_000))
    assert "wrote no PEFT adapter: the head is tied to the token embeddings" in printed.getvalue()
    assert not Path(config.out, "adapter").exists()
    lines = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    tuned = load_model(f"{config.out}/model", "vocabulary")
    assert tuned.model.config.tied_embeddings and "head" not in tuned.params
    rows = map(json.loads, Path(config.data.train).read_text().splitlines())
    pairs = [Preference(id=str(i), **row) for i, row in enumerate(rows)]
    examples, _ = tokenise(pairs, tiny_tokenizer(), config.max_length, 2)
    chosen = [dataclasses.replace(example, answers=example.answers[:1]) for example in examples]
    exported = evaluate(Objective(tuned.model, SupervisedFineTuning()), tuned.params, Batches(chosen, 4, 48, 0))
    assert exported["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("family", "objective", "told"),
    [
        ("qwen3", "sft", "lora.layers .*|head: the vocabulary head is tied to the token embeddings"),
        ("llama", "bt", "lora.layers .*|head: the head gives one reward and is trained in full already; leave head"),
    ],
)
def test_heads_that_cannot_have_additions_are_refused_before_the_run(settings, save_tiny, family, objective, told):
    init = ModelConfig(init=save_tiny("vocabulary", family=family))
    config = settings(model=init, objective=ObjectiveConfig(name=objective), lora=LoraConfig(2, layers=".*|head"))
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    assert not Path(config.out, "config.yaml").exists()
