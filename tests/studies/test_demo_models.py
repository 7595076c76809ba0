"""The studies on the demo task: that all methods are in them with options that can be used, and what they report."""

import dataclasses
import json
import math

import numpy as np
import pytest

from pargs_jax.commands.generate import settings_of
from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.config_files import from_mapping
from pargs_jax.decoding.methods import METHODS
from pargs_jax.demo import task
from pargs_jax.evaluation.answers import GivenAnswer, System
from studies import demo_models
from studies.demo import methods
from studies.demo_models import EVERY_METHOD, Entry, make_data, models_of, picked
from studies.experiment import Study, with_options
from studies.page import fill_page
from studies.weak_to_strong import run as weak_to_strong


@pytest.fixture
def study(tmp_path):
    return Study("LM", tmp_path, seeds=2, task="demo", scale=0.02)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(study, split, options, file):
    """Answers that are better the larger the weight, up to 2."""
    right = min(sum(options.get("weight", [0.5])), 2) / 3
    chance = np.random.default_rng(options["seed"])
    numbers = dict.fromkeys(("kl", "lm_tokens", "rm_tokens", "seconds"), 1.0)
    answers = []
    for row in read(study.prompts(split)):
        for sample in range(options.get("n", 1)):
            request = task.language.parse_prompt(row["prompt"])
            tone = "kind" if chance.random() < right else "quiet"
            text = f" Have a {tone} day, {request.name}."
            answers.append(GivenAnswer(row["id"], sample, row["prompt"], text, True, numbers))
    return System(file, file, tuple(answers))


def test_every_method_is_there():
    assert {entry.method for entry in EVERY_METHOD} == set(METHODS)


@pytest.mark.parametrize(
    "entry", (*EVERY_METHOD, *weak_to_strong.ENTRIES, *weak_to_strong.ENTRIES_ONCE), ids=lambda entry: entry.name
)
def test_the_options_of_every_entry_can_be_used(entry: Entry):
    weight = list(entry.weights[:1])
    options = {"method": entry.method, **entry.options, "rm": list(entry.models), "weight": weight}
    config = from_mapping(DecodeConfig, options, entry.name)
    config.validate()
    settings_of(config, METHODS[entry.method])


def test_models_are_there_for_every_entry_with_options_that_can_be_used(study):
    own, weak = models_of(study, 1, "LM"), models_of(study, 1, "SMALL", "weak_")
    for options in (*own.values(), *weak.values()):
        config = with_options(TrainConfig(), options)
        dataclasses.replace(config, model=dataclasses.replace(config.model, init="demo")).validate()
    used = {name for entry in EVERY_METHOD for name in (*entry.models, entry.lm)} - {"", demo_models.LM}
    assert used == set(own)
    assert weak["weak_distill"]["objective.teacher"] == str(study.model("weak_partial_bt", 1))


def test_the_data_that_the_demo_lacks(study, monkeypatch):
    monkeypatch.setattr(demo_models, "decode", answered)
    make_data(study, "LM")
    prompts = [{row["prompt"] for row in read(study.prompts(split))} for split in demo_models.SPLITS]
    assert list(map(len, prompts)) == [8, 8, 8] and len(set.union(*prompts)) == 24
    rewards = [row["reward"] for row in read(study.folder / "scored.jsonl")]
    assert len(rewards) == 64 and 0 <= min(rewards) < max(rewards) <= 1
    sampled = read(study.folder / "sampled.jsonl")
    assert len(sampled) == 64 and {row["reward"] for row in sampled} == {-3.0, -4.0}  # four parts are missing
    wrong = right = 0
    for row in read(study.folder / "labels.jsonl"):
        terms = [task.oracle_terms(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        tone = sum(sign * terms[i][name] for i, sign in ((0, 1), (1, -1)) for name in ("kind", "rude"))
        facts = sum(terms[0].values()) - sum(terms[1].values()) - tone
        for label, difference in zip(row["labels"], (tone, facts), strict=True):
            assert (label == 0.5) == (difference == 0)
            wrong += (label - 0.5) * difference < 0
            right += (label - 0.5) * difference > 0
    assert 0 < wrong / (wrong + right) < 0.3


def test_the_reports(tmp_path, monkeypatch):
    """With made-up answers; nothing is trained."""
    monkeypatch.setattr(demo_models, "decode", answered)
    monkeypatch.setattr(methods, "train_models", lambda *_: None)
    monkeypatch.setattr(weak_to_strong, "train_models", lambda *_: None)
    monkeypatch.setattr(weak_to_strong, "operations", lambda source: 1e9)
    words = ["--scale", "0.02", "--out", str(tmp_path / "runs"), "--results"]
    methods.main([*words, str(tmp_path / "methods")])
    found = json.loads((tmp_path / "methods" / "results.json").read_text())
    assert list(found["picked"]) == [entry.name for entry in EVERY_METHOD]
    assert found["picked"]["pargs partial_bt"] == "pargs partial_bt w2"  # the first of equals
    assert found["picked"]["genarm arm"] == "genarm arm w1"
    weak_to_strong.main([*words, str(tmp_path / "weak"), "--seeds", "2", "--weak", "SMALL"])
    found = json.loads((tmp_path / "weak" / "results.json").read_text())["settings"]
    assert found["genarm weak_arm w1"]["test gflop"]["mean"] == 2
    assert len(found["genarm weak_arm w1"]["test reward"]["by_training_run"]) == 2
    assert len(found["genarm arm w1"]["test reward"]["by_training_run"]) == 1
    assert (tmp_path / "weak" / "figure.png").exists()
    tables = (tmp_path / "weak" / "tables.md").read_text()
    for page, names in ((methods.PAGE, ["methods"]), (weak_to_strong.PAGE, ["methods", "differences", "runs"])):
        copy = tmp_path / page.name
        copy.write_text(page.read_text())
        fill_page(copy, dict.fromkeys(names, tables))


def test_weights_are_picked_on_the_eval_split():
    entry = Entry("pargs", ("partial_bt",), (1.0, 2.0))
    found = {
        f"{entry.name} w{w:g}": {"entry": entry.name, "weight": w, "eval reward": [[w]], "test reward": [[-w]]}
        for w in entry.weights
    }
    assert picked(found, [entry]) == {entry.name: f"{entry.name} w2"}
    assert math.isclose(found[f"{entry.name} w2"]["test reward"][0][0], -2)
