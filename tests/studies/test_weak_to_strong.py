"""The study of weak to strong: that all methods are in it with options that can be used, its data, and its report."""

import dataclasses
import json

import numpy as np
import pytest

from pargs_jax.commands.generate import settings_of
from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.config_files import from_mapping
from pargs_jax.decoding.methods import METHODS
from pargs_jax.demo import task
from pargs_jax.evaluation.answers import GivenAnswer, System
from studies.experiment import Study, with_options
from studies.page import fill_page
from studies.weak_to_strong import methods, run
from studies.weak_to_strong.methods import ENTRIES, SPLITS, STRONG, WEAK, Entry, make_data, models_of, picked


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
    assert {entry.method for entry in ENTRIES} == set(METHODS)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_options_of_every_entry_can_be_used(entry: Entry):
    options = {"method": entry.method, **entry.options, "rm": list(entry.models), "weight": list(entry.weights[:1])}
    config = from_mapping(DecodeConfig, options, entry.name)
    config.validate()
    settings_of(config, METHODS[entry.method])


def test_models_are_there_for_every_entry_with_options_that_can_be_used(study):
    models = models_of(study, 1, "SMALL")
    assert set(models) == set.union(*(entry.trained for entry in ENTRIES))
    for name, options in models.items():
        assert options["model.init"] == ("LM" if name.startswith(STRONG) else "SMALL")
        config = with_options(TrainConfig(), options)
        dataclasses.replace(config, model=dataclasses.replace(config.model, init="demo")).validate()
    assert models["distill"]["objective.teacher"] == str(study.model("partial_bt", 1))


def test_the_data_that_the_demo_lacks(study, monkeypatch):
    monkeypatch.setattr(methods, "decode", answered)
    make_data(study)
    prompts = [{row["prompt"] for row in read(study.prompts(split))} for split in SPLITS]
    assert list(map(len, prompts)) == [8, 8, 8] and len(set.union(*prompts)) == 24
    scored = read(study.folder / "scored.jsonl")
    assert all(row["true"] == task.oracle(row["prompt"], row["response"]) for row in scored)
    assert len(scored) == 32 and all(row["share"] == max(0, (row["true"] + 5) / 13) <= 1 for row in scored)
    sampled = read(study.folder / "sampled.jsonl")
    assert len(sampled) == 64 and {row["reward"] for row in sampled} == {-3.0, -4.0}  # four parts are missing
    wrong = right = 0
    for row in read(study.folder / "labelled.jsonl"):
        terms = [task.oracle_terms(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        tone = sum(sign * terms[i][name] for i, sign in ((0, 1), (1, -1)) for name in ("kind", "rude"))
        facts = sum(terms[0].values()) - sum(terms[1].values()) - tone
        for label, difference in zip(row["labels"], (tone, facts), strict=True):
            assert (label == 0.5) == (difference == 0)
            wrong += (label - 0.5) * difference < 0
            right += (label - 0.5) * difference > 0
    assert 0 < wrong / (wrong + right) < 0.3


def test_the_report_on_made_up_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "decode", answered)
    monkeypatch.setattr(run, "train_models", lambda *_: None)
    monkeypatch.setattr(run, "operations", lambda source: 1e9)
    words = ["--scale", "0.02", "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--seeds", "2"]
    run.main([*words, "--weak", "SMALL"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["picked"]) == [entry.name for entry in ENTRIES]
    assert found["picked"]["pargs partial_bt"] == "pargs partial_bt w2"  # the first of equals
    assert found["picked"]["genarm arm"] == "genarm arm w1"
    found = found["settings"]
    assert found["genarm arm w1"]["test gflop"]["mean"] == 2 and found["top_k"]["test gflop"]["mean"] == 1
    runs = {name: len(setting["test reward"]["by_training_run"]) for name, setting in found.items()}
    assert (runs["genarm arm w1"], runs["rad rad w10"], runs["top_k"], runs[f"top_k by {WEAK}"]) == (2, 1, 1, 1)
    assert (tmp_path / "figure.png").exists()
    page = tmp_path / "page.md"
    page.write_text(run.PAGE.read_text())
    fill_page(page, dict.fromkeys(("methods", "differences", "runs"), (tmp_path / "tables.md").read_text()))


def test_weights_are_picked_on_the_eval_split():
    found = {}
    for entry in ENTRIES:
        for weight in entry.weights or (None,):
            setting = {"entry": entry.name, "weight": weight, "test reward": [[-(weight or 0.0)]]}
            found[f"{entry.name} {weight}"] = setting | {"eval reward": [[weight or 0.0]]}
    assert picked(found)["pargs partial_bt"] == "pargs partial_bt 8.0" and picked(found)["greedy"] == "greedy None"
