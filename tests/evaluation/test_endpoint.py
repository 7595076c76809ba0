"""The judge behind an endpoint, on a local server that answers well, answers nonsense, hangs, fails, or is gone."""

import time

import pytest

from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import GivenAnswer, System
from pargs_jax.evaluation.config import EndpointConfig
from pargs_jax.evaluation.endpoint import PairwiseJudge, flip_rate, parse_verdict


def system(name, responses):
    return System(name, name, tuple(GivenAnswer(f"p{i}", 0, "Hi", text) for i, text in enumerate(responses)))


BASELINE = system("top_k", ["two words", "same", "a longer answer than that"])
MINE = system("pargs", ["three words here", "same", "short"])


def judged(url, cache, mine=MINE, **options):
    options = {"url": url, "model": "judge", "retries": 0, "timeout": 5.0, "parallel": 2} | options
    with PairwiseJudge(EndpointConfig(**options), cache) as judge:
        return judge.compare(mine, BASELINE), judge


def scores(found):
    return [found[f"p{i}"][0].score for i in range(len(found))]


def test_both_orders_are_asked_and_nothing_is_asked_twice(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    found, _ = judged(endpoint.url, tmp_path / "replies.jsonl", key_variable="JUDGE_KEY")
    assert scores(found) == [1.0, 0.5, 0.0]
    assert len(endpoint.requests) == 4  # two pairs; the answers of the third are the same
    assert set(endpoint.keys) == {"Bearer secret"} and endpoint.requests[0]["temperature"] == 0
    assert "secret" not in (tmp_path / "replies.jsonl").read_text()
    again, judge = judged(endpoint.url, tmp_path / "replies.jsonl")
    assert again == found and judge.asked == 0 and len(endpoint.requests) == 4
    # A new system, and one answer that was judged already: only the new one is asked about.
    judged(endpoint.url, tmp_path / "replies.jsonl", system("new", ["three words here", "another"]))
    assert len(endpoint.requests) == 6


def test_a_judge_that_prefers_a_place_flips_and_every_flip_is_a_tie(endpoint, tmp_path):
    endpoint.reply = lambda a, b: "[[A]]"
    found, _ = judged(endpoint.url, tmp_path / "replies.jsonl")
    assert scores(found) == [0.5, 0.5, 0.5]
    assert flip_rate([each for every in found.values() for each in every]) == pytest.approx(2 / 3)


def test_nonsense_does_not_count_and_is_counted_apart(endpoint, tmp_path):
    said = endpoint.reply
    endpoint.reply = lambda a, b: "As an AI model I cannot" if "short" in (a, b) else said(a, b)
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl")
    assert scores(found) == [1.0, 0.5, None]
    assert found["p2"][0].is_unparsable and not found["p2"][0].is_missing and judge.failure is None
    judged(endpoint.url, tmp_path / "replies.jsonl")
    assert len(endpoint.requests) == 4


def test_a_verdict_is_the_last_one_that_is_written():
    assert parse_verdict("First [[A]], no: [[ B ]]") == "B"
    assert parse_verdict("[[C]]") == "tie"
    assert parse_verdict("A is better") == parse_verdict("") == "unparsable"


def test_a_timeout_loses_no_finished_reply_and_is_asked_again(endpoint, tmp_path):
    hangs, said = {"short"}, endpoint.reply
    endpoint.reply = lambda a, b: 1.5 if {a, b} & hangs else said(a, b)
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl", timeout=0.3)
    assert scores(found) == [1.0, 0.5, None] and found["p2"][0].is_missing
    assert "no reply in time" in judge.failure
    hangs.clear()
    before = len(endpoint.requests)
    again, _ = judged(endpoint.url, tmp_path / "replies.jsonl")
    assert scores(again) == [1.0, 0.5, 0.0] and len(endpoint.requests) == before + 2


def test_a_failure_that_passes_is_tried_again(endpoint, tmp_path):
    told, said = iter([503, 429]), endpoint.reply
    endpoint.reply = lambda a, b: next(told, said(a, b))
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl", retries=2, parallel=1)
    assert scores(found) == [1.0, 0.5, 0.0] and judge.failure is None and len(endpoint.requests) == 6


def test_an_endpoint_that_is_gone_is_given_up_soon(endpoint, tmp_path):
    endpoint.close()
    many = system("many", [f"answer {i}" for i in range(50)])
    began = time.monotonic()
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl", mine=many)
    assert scores(found) == [None, None, None] and "cannot be reached" in judge.failure
    assert time.monotonic() - began < 20


def test_a_wrong_key_ends_the_asking_at_once_and_a_refused_request_does_not(endpoint, tmp_path):
    said, endpoint.reply = endpoint.reply, lambda a, b: 401
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl", parallel=1)
    assert len(endpoint.requests) == 1 and scores(found) == [None, 0.5, None] and "401" in judge.failure
    endpoint.reply = lambda a, b: 400 if "two words" in (a, b) else said(a, b)
    found, judge = judged(endpoint.url, tmp_path / "replies.jsonl", parallel=1)
    assert scores(found) == [None, 0.5, 0.0]


def test_replies_survive_a_kill_in_the_middle_of_a_line(endpoint, tmp_path):
    cache = tmp_path / "replies.jsonl"
    judged(endpoint.url, cache)
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:3]) + lines[3][:9])
    found, judge = judged(endpoint.url, cache)
    assert scores(found) == [1.0, 0.5, 0.0] and judge.asked == 1
    assert len(cache.read_text().splitlines()) == 4
    cache.write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="line 1 is not a judge's reply"):
        judged(endpoint.url, cache)
