"""The trace of an answer: its numbers are those of the models, its texts are the answer, its file goes on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.commands.generate import generate
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation.output import AnswersFile
from pargs_jax.generation.session import Session, Settings
from pargs_jax.generation.traces import AnswerTrace, read_traces
from pargs_jax.models.hf import load_model

PROMPTS = [Prompt("a", "Hi"), Prompt("b", "My lamp broke. What now?")]
TOKENS, WEIGHT, TEMPERATURE, K = 8, 2.0, 1.5, 4


@pytest.fixture(scope="module")
def session(lm, rm):
    return Session(lm, [rm])


def traced(session, method, **changes):
    settings = Settings(METHODS[method], max_new_tokens=TOKENS, **{"trace": "candidates"} | changes)
    return [answer for batch in session.answer(PROMPTS, settings) for answer in batch]


@pytest.fixture(scope="module")
def answers(session):
    return traced(session, "pargs", k=K, weights=(WEIGHT,), temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def reference(lm, rm):
    """By one full pass over a text: the language model's logits after it, and the reward of it."""
    lm_model, lm_params = load_model(lm, "vocabulary")[:2]
    rm_model, rm_params = load_model(rm, "reward")[:2]

    @jax.jit
    def both(tokens):
        logits = lm_model.logits(lm_params, lm_model.encode(lm_params, tokens)[0])
        return logits, rm_model.rewards(rm_params, rm_model.encode(rm_params, tokens))[0]

    def of(tokens):
        logits, rewards = both(jnp.asarray([tokens + [0] * (48 - len(tokens))]))
        return np.asarray(logits[len(tokens) - 1], np.float64), float(rewards[len(tokens) - 1])

    return of


def test_every_number_is_that_of_the_models(session, answers, reference):
    for answer in answers:
        text = session.tokenizer.encode_prompt(answer.prompt)
        for token in answer.trace.tokens:
            logits, _ = reference(text)
            log_p = logits - np.logaddexp.reduce(logits)
            best = np.argsort(-logits)[:K]
            rewards = np.array([reference([*text, int(each)])[1] for each in best])
            scores = (log_p[best] + WEIGHT * rewards) / TEMPERATURE
            log_q = scores - np.logaddexp.reduce(scores)
            order = np.argsort(-log_q)
            assert [each.id for each in token.candidates] == best[order].tolist()
            for name, expected in (("log_p", log_p[best]), ("log_q", log_q), ("rewards", rewards[:, None])):
                found = [getattr(each, name) for each in token.candidates]
                np.testing.assert_allclose(found, expected[order], atol=2e-4)
            (chosen,) = (each for each in token.candidates if each.id == token.id)
            assert (chosen.log_p, chosen.log_q, chosen.rewards) == (token.log_p, token.log_q, token.rewards)
            assert token.entropy == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=2e-4)
            assert token.kl == pytest.approx((np.exp(log_q) * (log_q - log_p[best])).sum(), abs=2e-4)
            text.append(token.id)
        assert answer.trace.guide_rewards == answer.guide_rewards == pytest.approx(token.rewards, abs=1e-6)


def test_an_answers_totals_are_the_sums_over_its_tokens(session, answers):
    for answer in answers:
        trace = answer.trace
        assert len(trace.tokens) == answer.tokens and "".join(token.text for token in trace.tokens) == answer.response
        assert sum(token.log_p for token in trace.tokens) == pytest.approx(answer.log_probability, abs=1e-4)
        assert sum(token.kl for token in trace.tokens) == pytest.approx(answer.kl, abs=1e-4)
        shared = ("id", "sample", "prompt", "response", "finish_reason", "log_probability", "kl", "guide_rewards")
        assert [getattr(trace, name) for name in shared] == [getattr(answer, name) for name in shared]
        said = (trace.method, trace.weights, trace.k, trace.temperature, trace.seed, trace.options)
        assert said == ("pargs", (WEIGHT,), K, TEMPERATURE, 0, None)
        assert (trace.lm, *trace.reward_models) == (session.lm, session.reward_models[0].source)


def test_impossible_candidates_and_missing_rewards_in_traces(session):
    """Greedy decoding gives one candidate all the probability; without guidance there are no rewards of tokens."""
    for answer in traced(session, "pargs_greedy", k=3):
        assert answer.trace.temperature is None
        for token in answer.trace.tokens:
            assert [each.log_q for each in token.candidates] == [0.0, -math.inf, -math.inf]
            assert token.candidates[0].id == token.id and token.kl == pytest.approx(-token.log_p)
        rows = [token["candidates"] for token in answer.trace.as_row()["tokens"]]
        assert {candidate["log_q"] for row in rows for candidate in row} == {0.0, None}
        assert AnswerTrace.from_row(json.loads(json.dumps(answer.trace.as_row(), allow_nan=False))) == answer.trace
    for answer in traced(session, "top_k", trace="tokens"):
        assert answer.trace.weights == () and len(answer.trace.guide_rewards) == 1
        assert all(token.rewards == () and token.candidates is None for token in answer.trace.tokens)
        assert "candidates" not in answer.trace.as_row()["tokens"][0]


def test_an_answer_is_the_same_with_and_without_its_trace(session, answers):
    plain = traced(session, "pargs", k=K, weights=(WEIGHT,), temperature=TEMPERATURE, trace=None)
    assert [answer.trace for answer in plain] == [None, None]
    assert [answer.response for answer in plain] == [answer.response for answer in answers]


@pytest.fixture
def config(lm, rm, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": "Hi " * i}) + "\n" for i in range(4)))
    return DecodeConfig(
        lm=lm, rm=(rm,), method="pargs", k=K, max_new_tokens=4, batch_size=2, prompts=str(prompts),
        out=str(tmp_path / "answers.jsonl"), trace=str(tmp_path / "new" / "traces.jsonl"), n=2,
    )  # fmt: skip


def test_a_killed_run_goes_on_with_a_trace_for_every_answer(config, tmp_path):
    made = generate(config)
    out, trace = tmp_path / "answers.jsonl", tmp_path / "new" / "traces.jsonl"
    whole = trace.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = list(read_traces(trace))
    assert found == [dataclasses.replace(answer.trace, options=rows[0]["options"]) for answer in made]
    assert [(each.id, each.sample) for each in found] == [(row["id"], row["sample"]) for row in rows]
    assert [each.as_row()["guide_reward"] for each in found] == [row["guide_reward"] for row in rows]

    answers = out.read_text().splitlines(keepends=True)
    # Killed between a batch's traces and its answers; within both; before the first answer.
    for kept, text in ((4, "".join(whole[:6])), (3, "".join(whole[:5]) + whole[5][:20]), (0, whole[0] + whole[1][:9])):
        out.write_text("".join(answers[:kept]))
        trace.write_text(text)
        generate(config)
        assert trace.read_text() == "".join(whole)
        again = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(row["id"], row["sample"], row["response"]) for row in again] == [
            (row["id"], row["sample"], row["response"]) for row in rows
        ]


def test_answers_without_a_trace_and_traces_of_other_answers_are_refused(config, tmp_path):
    config = dataclasses.replace(config, limit=1, n=1, format="plain")
    untraced = dataclasses.replace(config, trace=None)
    generate(untraced)
    out, trace = tmp_path / "answers.jsonl", tmp_path / "new" / "traces.jsonl"
    with pytest.raises(
        InputError, match=r"traces.jsonl: line 1 is not the trace of an answer in .*answers.jsonl; answers"
    ):
        generate(config)
    out.unlink()
    generate(config)
    before = trace.read_bytes()
    other = dataclasses.replace(config, out=str(tmp_path / "other.jsonl"))
    with pytest.raises(InputError, match=r"traces.jsonl: already exists, and does not belong to .*other.jsonl"):
        generate(other)
    with AnswersFile(out, config), pytest.raises(InputError, match="another decode\\.py is writing it"):
        AnswersFile(tmp_path / "other.jsonl", other)
    # One that goes on without --trace leaves the traces alone, and then there is no going back.
    generate(dataclasses.replace(untraced, limit=2))
    assert trace.read_bytes() == before
    with pytest.raises(InputError, match="line 2 is not the trace of an answer"):
        generate(dataclasses.replace(config, limit=2))
    assert trace.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "--trace: needs --out"),
        ({"trace": None, "trace_candidates": True}, "--trace-candidates: needs --trace"),
        ({"trace": "a.jsonl", "out": "./a.jsonl"}, "--trace and --out: got a.jsonl for both"),
        ({"lm": "demo", "method": None}, "--trace: needs --method NAME, one of greedy,"),
        ({"lm": "demo", "method": None, "trace": None}, "--n: needs --method NAME, one of greedy,"),
    ],
)
def test_options_that_do_not_go_together(config, changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **changes).validate()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda row: row.pop("kl"), "'kl' is missing"),
        (lambda row: row["tokens"][1].pop("log_q"), "'log_q' is missing"),
        (lambda row: row["tokens"][0].update(text="!?"), "the texts of its tokens do not add up to its response"),
        (lambda row: row["tokens"][0].update(rewards=1), r"[^\n]*iterable[^\n]*"),
        (lambda row: row.update(tokens=3), r"[^\n]*iterable[^\n]*"),
    ],
)
def test_a_line_that_is_not_a_trace_is_one_line_of_error(answers, tmp_path, spoil, reason):
    path = tmp_path / "t.jsonl"
    good = json.dumps(answers[0].trace.as_row())
    row = json.loads(good)
    spoil(row)
    path.write_text(f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(
        InputError,
        match=rf"t.jsonl: line 2 is not a trace \({reason}\); the option trace of decode.py writes them\Z",
    ):
        list(read_traces(path))


def test_a_file_that_does_not_hold_traces_is_one_line_of_error(tmp_path):
    for name, content in {"text": b"Hi\n", "list": b"[]\n", "bytes": b"\xff\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"\A{tmp_path / name}: [^\n]+\Z"):
            list(read_traces(tmp_path / name))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_traces(tmp_path / "nowhere"))
