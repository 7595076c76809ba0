"""The study of costs: its passes read what the answers say was read, and it goes on where it stopped."""

import json

import pytest

from benchmarks.measure import Ceilings
from pargs_jax.errors import InputError
from studies.cost import run
from studies.cost.passes import queries


def test_every_method_is_measured_once():
    names = [name for entry in run.entries() for name in entry.methods]
    assert sorted(names) == sorted(run.METHODS)
    assert ("args", "pargs_greedy") in [entry.methods for entry in run.entries()]


WORDS = ["--lm", "tiny", "--rm", "tiny", "--tokenizer", "demo", "--prompt", "8", "--tokens", "4", "--batch", "2"]
METHODS = ["top_k", "contrastive", "pargs", "vas", "weak_to_strong", "speculative_rejection"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of a few methods, at a size of seconds."""
    folder = tmp_path_factory.mktemp("cost")
    words = [*WORDS, "--rounds", "1", "--out", str(folder), "--results", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ceilings", lambda dtype: Ceilings(1e10, 1e11))
        run.main([*words, "--methods", *METHODS])
    return folder, words


def test_the_passes_read_the_tokens_that_answers_record(results):
    folder, words = results
    args = run.parse_arguments(words)
    measurement = run.Measurement(args, folder / "runs.jsonl")
    timed = {row["name"]: row for row in measurement.rows if "seconds" in row}
    assert len(timed) == len(METHODS)
    for entry in run.entries():
        row = timed.get(entry.name)
        if row is not None and row["tokens"] == 2 * args.tokens:  # no answer ended early
            found = measurement.passes(entry, 2)
            assert row["lm_tokens"] == queries(found, guide=False, prompts=False), entry.name
            assert row["rm_tokens"] == queries(found, guide=True, prompts=False), entry.name
    assert sum(row["tokens"] == 2 * args.tokens for row in timed.values()) >= 4


def test_what_was_measured_is_not_measured_again_and_the_page_is_filled(results, monkeypatch):
    folder, words = results
    before = (folder / "runs.jsonl").read_text()

    def decode(self, session, method, batch):
        raise AssertionError("measured again")

    monkeypatch.setattr(run.Measurement, "decode", decode)
    run.main([*words, "--methods", *METHODS])
    assert (folder / "runs.jsonl").read_text() == before
    page = folder / "page.md"
    page.write_text("<!-- machine -->\n<!-- end -->\n<!-- costs -->\n<!-- end -->\n")
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "FIGURE", folder / "page.png")
    run.main(["--report", "--results", str(folder)])
    assert "| vas |" in page.read_text() and (folder / "page.png").exists()
    summary = {each["name"]: each for each in json.loads((folder / "results.json").read_text())["methods"]}
    assert summary["args_stochastic, pargs"]["rm_tokens"] == 10
    assert summary["top_k"]["operations"] == 1
    with pytest.raises(InputError, match="other settings"):
        run.main([*words, "--tokens", "5"])


def test_what_would_take_too_long_is_left_out(results):
    folder, words = results
    run.main([*words, "--methods", "chunk_beam", "--longest", "0"])
    assert "chunk_beam (a run takes at least 0 s)" in (folder / "costs.md").read_text()
