"""The page that explains answers, as a file: what it holds and refuses. `test_explanation_page.py` looks at it."""

import dataclasses
import html.parser
import json
import subprocess
import sys

import pytest

from pargs_jax.errors import InputError
from pargs_jax.evaluation.explanation import SHOWN_CANDIDATES, explanation_page
from pargs_jax.generation.traces import TracedCandidate


def data_of(page):
    """What the page's script reads, found by an HTML parser and not by the page's own script."""

    class Reader(html.parser.HTMLParser):
        inside, texts, tags = None, [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.inside = dict(attributes).get("id") or tag

        def handle_endtag(self, tag):
            self.inside = None

        def handle_data(self, text):
            if self.inside == "trace":
                self.texts.append(text)

    reader = Reader()
    reader.texts, reader.tags = [], []
    reader.feed(page)
    assert reader.tags.count("script") == 2
    return json.loads("".join(reader.texts))["answers"]


HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "{{script}}", "\u2028", "\ud800", "&lt;", "]]>"]


def test_the_page_holds_the_numbers_of_the_trace(make_trace):
    guided, unguided = make_trace([" a", " b"]), make_trace([" a", " c"], weights=(0.0,))
    (answer,) = data_of(explanation_page([guided], [unguided]))
    for name, trace in (("guided", guided), ("unguided", unguided)):
        row = answer[name]
        assert row["log_probability"] == pytest.approx(trace.log_probability, abs=1e-4)
        assert [token["text"] for token in row["tokens"]] == [token.text for token in trace.tokens]
        for token, shown in zip(trace.tokens, row["tokens"], strict=True):
            assert shown["log_q"] == pytest.approx(token.log_q, abs=1e-4)
            assert [each[0] for each in shown["candidates"]] == [each.id for each in token.candidates]
            assert shown["candidates"][1][2:4] == pytest.approx(token.candidates[1][2:4], abs=1e-4)


def test_texts_stay_data_wherever_they_are(make_trace):
    trace = make_trace(HOSTILE, prompt=HOSTILE[0], lm=HOSTILE[1], method=HOSTILE[2], reward_models=(HOSTILE[0],))
    (answer,) = data_of(explanation_page([trace]))
    assert [token["text"] for token in answer["guided"]["tokens"]] == [*HOSTILE, ""]
    assert [answer["guided"][name] for name in ("prompt", "lm", "method")] == HOSTILE[:3]


def test_minus_infinity_is_null(make_trace):
    trace = make_trace([" a"])
    impossible = TracedCandidate(7, " x", -1.0, float("-inf"), (0.0,))
    token = trace.tokens[0]._replace(candidates=(*trace.tokens[0].candidates, impossible))
    (answer,) = data_of(explanation_page([dataclasses.replace(trace, tokens=(token, *trace.tokens[1:]))]))
    assert answer["guided"]["tokens"][0]["candidates"][-1] == [7, " x", -1.0, None, [0.0]]


def test_the_page_shows_the_likeliest_of_many_candidates_and_says_so(make_trace):
    drawn = 150
    (answer,) = data_of(explanation_page([make_trace([" a"], k=300, drawn=[drawn])]))
    token, shown = make_trace([" a"], k=300, drawn=[drawn]).tokens[0], answer["guided"]["tokens"][0]
    ids = {each[0] for each in shown["candidates"]}
    assert shown["candidate_count"] == 300 and SHOWN_CANDIDATES // 2 <= len(ids) <= SHOWN_CANDIDATES + 1
    assert token.id in ids
    for name in ("log_p", "log_q"):
        assert max(token.candidates, key=lambda each: getattr(each, name)).id in ids


def test_rewards_that_add_up_are_told_from_those_where_the_last_counts(make_trace):
    texts = [" a", " b", " c"]
    traces = [make_trace(texts, weights=(1.0, 2.0)), make_trace(texts, adds_up=True, id="b")]
    assert [answer["adds_up"] for answer in data_of(explanation_page(traces))] == [[False, False], [True]]


def test_traces_that_do_not_match_are_refused(make_trace):
    guided = make_trace([" a"])
    with pytest.raises(InputError, match="at least one answer"):
        explanation_page([])
    with pytest.raises(InputError, match="'a' appears twice in the trace"):
        explanation_page([guided, guided])
    with pytest.raises(InputError, match="has the prompt 'Else', but the guided one has"):
        explanation_page([guided], [make_trace([" a"], prompt="Else")])
    with pytest.raises(InputError, match="has the lm 'gpt2', but the guided one has"):
        explanation_page([guided], [make_trace([" a"], lm="gpt2")])
    two = [guided, make_trace([" b"], sample=1)]
    assert [answer["unguided"] is None for answer in data_of(explanation_page(two, [guided]))] == [False, True]


def test_the_command_makes_the_page_from_trace_files(make_trace, tmp_path):
    for name, text in (("guided", " hello"), ("unguided", " bye")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(make_trace([text]).as_row()) + "\n")

    def run(*arguments):
        command = [sys.executable, "-m", "pargs_jax.commands.explain", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        return ended.returncode, ended.stderr.strip()

    assert run("guided.jsonl", "unguided.jsonl", "--out", "new/page.html") == (0, "")
    (answer,) = data_of((tmp_path / "new/page.html").read_text())
    assert [answer[name]["response"] for name in ("guided", "unguided")] == [" hello", " bye"]
    for arguments, said in (
        (["guided.jsonl"], "--out"),
        (["absent.jsonl", "--out", "p.html"], "absent.jsonl"),
        (["new/page.html", "--out", "p.html"], "line 1 is not a trace"),
        (["guided.jsonl", "--out", "."], "is a folder"),
    ):
        code, error = run(*arguments)
        assert code == 2 and said in error and len(error.splitlines()) == 1
