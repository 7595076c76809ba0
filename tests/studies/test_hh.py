"""The study of HH: its statistics against simulations, and all of it on a few made-up pairs."""

import gzip
import json
import math

import numpy as np
import pytest
from scipy import stats

from pargs_jax.errors import InputError
from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer
from studies.hh import run
from studies.hh.effects import crossed_difference, detectable, effect, pairs_needed
from studies.page import fill_page

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("difference", "discordant"), [(0.1, 0.3), (0.04, 0.2), (-0.06, 0.15)])
def test_the_pairs_needed_give_mcnemars_test_its_power(difference, discordant):
    needed = math.ceil(pairs_needed(difference, discordant))
    ahead = (discordant + difference) / 2
    draws = RNG.multinomial(needed, [ahead, discordant - ahead, 1 - discordant], size=20_000)
    statistic = (draws[:, 0] - draws[:, 1]) ** 2 / np.maximum(draws[:, 0] + draws[:, 1], 1)
    assert (stats.chi2.sf(statistic, 1) < 0.05).mean() == pytest.approx(0.8, abs=0.02)
    assert detectable(pairs_needed(difference, discordant), discordant) == pytest.approx(abs(difference))


def test_no_difference_needs_endless_pairs():
    assert pairs_needed(0.0, 0.3) == math.inf


@pytest.mark.parametrize("spreads", [(0.3, 0.0, 0.5), (0.1, 0.05, 0.5), (0.0, 0.1, 0.5)])
def test_intervals_over_prompts_and_seeds_cover_the_truth(spreads):
    """Spreads: of prompts, of seeds, and of what is left."""
    of_prompts, of_seeds, rest = spreads
    covered = []
    for _ in range(600):
        drawn = 0.02 + of_seeds * RNG.normal(size=(5, 1)) + of_prompts * RNG.normal(size=200)
        interval = crossed_difference(drawn + rest * RNG.normal(size=(5, 200))).interval
        covered.append(interval.low <= 0.02 <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_an_effect_by_hand():
    ahead, behind = np.array([[1.0, 1, 0, 1], [1, 1, 1, 0]]), np.array([[1.0, 0, 0, 1], [0, 1, 1, 1]])
    found = effect(ahead, behind)
    assert found.overall.mean == found.over_prompts.mean == found.over_seeds.mean == 1 / 8
    assert found.by_seed == (0.25, 0.0)
    assert found.discordant == 3 / 8
    assert found.standardised == pytest.approx((1 / 8) / np.sqrt(3 / 8 - 1 / 64))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "data").mkdir()
    for split, count in (("train", 16), ("test", 6)):
        rows = [
            {
                "prompt": f"\n\nHuman: {i % 5} {split}\n\nAssistant:",
                "chosen": f" Yes, {i}.",
                "rejected": f" Yes, no {i}.",
            }
            for i in range(count)
        ]
        with gzip.open(folder / "data" / f"hh_helpful.{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def train(config):
    """Stands for training: another random reward model for every seed and objective."""
    seed = 2 * config.seed + (config.objective.name == "bt")
    model, params = tiny_model("llama", "reward", seed=seed, vocab_size=tiny_tokenizer().vocab_size)
    save_model(config.output_folder / "model", model, params, special_tokens={"eos_token_id": 2})
    tiny_tokenizer().save(config.output_folder / "model")


def test_a_small_study_runs_reports_and_is_not_done_again(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", train)
    words = ["--shared", str(shared), "--init", "demo", "--sets", "helpful", "--seeds", "2", "--max-length", "48"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    run.main(words)
    assert len(run.read(tmp_path / "models.jsonl")) == 4
    found = json.loads((tmp_path / "results.json").read_text())["compared"]
    assert [row["share"] for row in found] == list(run.SHARES)
    assert {(row["pairs"], row["prompts"]) for row in found} == {(6, 5)}
    assert (tmp_path / "differences.png").exists() and "pairs needed" in (tmp_path / "pairs.md").read_text()

    def not_again(config):
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "train", not_again)
    run.main(words)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in ("verdict", "differences", "pairs")))
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "FIGURE", tmp_path / "page.png")
    run.main(["--report", "--results", str(tmp_path)])
    assert page.read_text().count("| helpful |") == 10
    with pytest.raises(InputError, match="another batch_size"):
        run.main([*words, "--batch-size", "2"])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="stories260k: is not there"):
        run.main(["--shared", str(tmp_path)])
    with pytest.raises(InputError, match=r"hh_harmless.train.jsonl.gz: is not there"):
        run.main(["--shared", str(tmp_path), "--init", "demo"])
    with pytest.raises(InputError, match="has no part"):
        (tmp_path / "page.md").write_text("nothing")
        fill_page(tmp_path / "page.md", {"differences": ""})
