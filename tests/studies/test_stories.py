"""What the studies of stories stand on: prompts, true rewards, pairs and standard errors."""

import json
from pathlib import Path

import numpy as np
import pytest

from pargs_jax.evaluation.answers import load_systems
from studies import stories
from studies.experiment import Study, estimate
from studies.sentiment.run import ENTRIES, picked


@pytest.fixture
def study(tmp_path):
    return Study("LM", tmp_path, seeds=1, scale=0.1)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_different_splits_differ_and_have_no_valence(study):
    pytest.importorskip("vaderSentiment")
    stories.make_prompts(study)
    prompts = {split: [row["prompt"] for row in read(study.prompts(split))] for split in stories.SPLITS}
    everything = [text for texts in prompts.values() for text in texts]
    assert len(set(everything)) == len(everything) == 130
    assert {stories.valence("", text) for text in everything} == {0.0}


def test_valence_is_the_mean_over_all_words():
    pytest.importorskip("vaderSentiment")
    love, hate = 3.2, -2.7  # as the lexicon has them
    assert stories.valence("", "Love, and a hate.") == pytest.approx(10 * (love + hate) / 4)
    assert stories.valence("", "") == 0


def test_pairs_are_two_samples_of_a_prompt_labelled_with_noise(study, monkeypatch):
    pytest.importorskip("vaderSentiment")
    words = ["love", "table", "hate", "table", "table", "table", "good", "bad"]
    answers = [f'{{"id": "{i}", "sample": {s}, "prompt": "p{i}", "response": "{w}"}}' for i in range(50)
               for s, w in enumerate(words)]  # fmt: skip
    written = study.out / "samples.jsonl"
    written.write_text("\n".join(answers))
    monkeypatch.setattr(stories, "decode", lambda *_: load_systems([("", str(written))])[0])
    study.folder.mkdir()
    said = stories.make_pairs(study)
    rows = read(study.pairs("train"))
    assert said["train_pairs"] == len(rows) == 150  # of each prompt's four pairs, one has no difference
    assert {frozenset((row["chosen"], row["rejected"])) for row in rows} == {
        frozenset(pair) for pair in (("love", "table"), ("hate", "table"), ("good", "bad"))
    }
    wrong = sum(stories.valence("", row["chosen"]) < stories.valence("", row["rejected"]) for row in rows)
    assert said["train_labels_against_the_valence"] == wrong / 150 == 0  # their valences differ by 27 and more


def test_a_standard_error_covers_prompts_and_training_runs():
    draws = np.random.default_rng(0)
    prompts, runs = draws.normal(size=(500, 1, 40)), 0.5 * draws.normal(size=(500, 5, 1))
    tables = prompts + runs + 0.3 * draws.normal(size=(500, 5, 40))
    found = [estimate(table) for table in tables]
    variance = 1 / 40 + 0.5**2 / 5 + 0.3**2 / 200
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(variance, rel=0.05)
    assert np.var([each.mean for each in found]) == pytest.approx(variance, rel=0.1)
    assert estimate(tables[0][:1]).standard_error == pytest.approx(np.std(tables[0][0], ddof=1) / np.sqrt(40))


def test_weights_are_picked_on_the_eval_split():
    found = {}
    for entry in ENTRIES:
        for weight in entry.weights or (None,):
            setting = {"method": entry.method, "weight": weight, "k": stories.K, "test valence": [[-(weight or 0.0)]]}
            found[f"{entry.method} {weight}"] = setting | {"eval valence": [[weight or 0.0]]}
    chosen = picked(found)
    assert list(chosen) == [entry.method for entry in ENTRIES]
    assert chosen["pargs"] == "pargs 8.0" and chosen["greedy"] == "greedy None"
