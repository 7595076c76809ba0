"""The study of two objectives: its numbers against counting and by hand, and all of it on made-up answers."""

import json

import numpy as np
import pytest

from pargs_jax.evaluation.answers import GivenAnswer, System
from studies import stories
from studies.objectives import run
from studies.objectives.fronts import hypervolume, hypervolume_estimate, inner_products, on_front

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_hypervolume_is_the_share_of_random_points_that_are_dominated(count):
    points = RNG.uniform(-0.5, 1, size=(count, 2))
    thrown = RNG.uniform(0, 1, size=(200_000, 2))
    dominated = (thrown[:, None] < points).all(axis=-1).any(axis=1)
    assert hypervolume(points, (0, 0)) == pytest.approx(dominated.mean(), abs=0.005)


def test_a_hypervolume_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, -5.0], [1.5, 1.5], [2.0, 2.0]])
    assert hypervolume(points, (0, 0)) == 1 * 3 + 1 * 2
    assert hypervolume(points, (-1, -6)) == 2 * 9 + 1 * 8 + 1 * 1
    assert hypervolume(points, (5, 5)) == 0
    assert on_front(points).tolist() == [True, True, True, False, True]


def test_inner_products_by_hand():
    preferences = np.array([[1.0, 0.0], [0.25, 0.75]])
    assert inner_products(preferences, np.array([[2.0, 9.0], [4.0, 8.0]])) == (2 + 1 + 6) / 2


def test_the_standard_error_of_a_hypervolume_covers_prompts_and_training_runs():
    """One point above the origin: the area is the product of its rewards."""
    prompts, runs = RNG.normal(size=(200, 1, 50, 1, 2)), 0.3 * RNG.normal(size=(200, 4, 1, 1, 2))
    found = [hypervolume_estimate(each, (0, 0)) for each in 3 + prompts + runs]
    variance = 3**2 * 2 * (1 / 50 + 0.3**2 / 4)
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(variance, rel=0.1)
    assert np.mean([each.mean for each in found]) == pytest.approx(9, rel=0.02)


def answered(study, split, options, file):
    """Answers of which as many are happy, or in short words, as the weights say."""
    shares = options.get("preference", options.get("weight", [0.5]))
    happy = shares[0] / sum(shares) if len(shares) == 2 else 0.5
    chance = np.random.default_rng(options.get("seed", 0))
    numbers = {"kl": 1.0}
    answers = [
        GivenAnswer(
            row["id"], sample, row["prompt"], "lovely wonderful" if chance.random() < happy else "a b", True, numbers
        )
        for row in map(json.loads, study.prompts(split).read_text().splitlines())
        for sample in range(options.get("n", 1))
    ]
    return System(file, file, tuple(answers))


def test_the_study_on_made_up_answers(tmp_path, monkeypatch):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(stories, "decode", answered)
    monkeypatch.setattr(run, "decode", answered)
    monkeypatch.setattr(run, "train_reward_models", lambda *_: None)
    averaged = []
    monkeypatch.setattr(run, "soup", lambda sources, weights, out: averaged.append((sources, weights)))
    words = ["--lm", "demo", "--scale", "0.02", "--seeds", "2", "--out", str(tmp_path / "runs")]
    run.main([*words, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["about"]["correlation"] == pytest.approx(-1)
    pairs = {
        name: (tmp_path / "runs" / "stories" / f"pairs.{name}.jsonl").read_text().splitlines()
        for name in (*run.MEASURES, "both")
    }
    assert 0 < len(pairs["valence"]) == len(pairs["short words"]) < len(pairs["both"]) == 80
    labels = [tuple(json.loads(row)["labels"]) for row in pairs["both"]]
    assert labels.count((0.5, 0.5)) == 80 - len(pairs["valence"])  # the continuations are the same
    assert {(1.0, 0.0), (0.0, 1.0)} < set(labels)
    assert {weights[0] for _, weights in averaged} == {0.25, 0.5, 0.75}
    assert averaged[0][0] == [str(tmp_path / "runs" / "stories" / f"dpo-{name}-0") for name in run.MEASURES]
    rewards = np.array(found["settings"]["genarm 1"]["test"]["rewards"])
    assert rewards[0, 0] > rewards[2, 0] > rewards[4, 0] and rewards[0, 1] < rewards[2, 1] < rewards[4, 1]
    assert (tmp_path / "figure.png").exists() and run.NAMES["soup"] in (tmp_path / "tables.md").read_text()
