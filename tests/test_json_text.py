"""The reader of JSON, and that whatever users give goes through it."""

import json

import pytest

from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import load_preferences, load_prompts
from pargs_jax.data.sources import Rows
from pargs_jax.errors import InputError, InputWarning
from pargs_jax.generation.answers import Answer
from pargs_jax.generation.output import AnswersFile
from pargs_jax.json_text import DEEPEST, LONGEST_INTEGER, parse_json
from pargs_jax.models.weights import read_json
from pargs_jax.text.prompts import get_form
from pargs_jax.training.metrics_log import MetricsFile

HOSTILE = {
    "[" * 100_000: "is nested too deeply; lists and objects must lie at most 64 deep",
    "[" * 200 + "]" * 200: "is nested too deeply; lists and objects must lie at most 64 deep",
    '{"id": ' + "9" * 5000 + "}": "has an integer of 5000 digits, must be at most 300",
    '{"a": 1,}': "is not JSON: ",
    "": "is not JSON: Expecting value at column 1",
    '{\n"a" 1}': "is not JSON: Expecting ':' delimiter at line 2, column 5",
}


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(("text", "reason"), HOSTILE.items(), ids=range(len(HOSTILE)))
def test_what_is_refused(text, reason):
    assert refused(lambda: parse_json(text)).startswith(reason)
    assert refused(lambda: parse_json(text.encode())).startswith(reason)


def test_what_is_read():
    deepest = "[" * DEEPEST + "]" * DEEPEST
    longest = "9" * LONGEST_INTEGER
    for text in (deepest, longest, "-1", "1.5", '"\\ud800"', '{"a": [[1], {"b": null}]}'):
        assert parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
    assert "nested too deeply" in refused(lambda: parse_json(f"[{deepest}]"))
    assert refused(lambda: parse_json(b'"\xff"')) == "is not UTF-8"
    wide = json.dumps([{"role": "user", "content": [str(i)]} for i in range(1000)])
    assert parse_json(wide) == json.loads(wide)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text and "\n" not in text], ids=range(4))
def test_one_hostile_line_ends_nothing_but_itself(text, tmp_path):
    """A bad row is set aside; a bad prompt, answer, config or metric is one line that says where."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n" + text + "\n")
    loaded = load_preferences(rows, get_form("plain"))
    assert len(loaded.rows) == 1 and [bad.line for bad in loaded.bad_rows] == [2]
    assert refused(lambda: load_prompts(rows, get_form("plain"))).startswith(f"{rows}: line 2: the line ")

    config = tmp_path / "config.json"
    config.write_text(text)
    assert refused(lambda: read_json(config)).startswith(f"{config}: not a JSON object (it ")
    assert refused(lambda: list(Rows(config))).startswith(f"{config}: ")

    options, answers = DecodeConfig(lm="lm", method="greedy", prompts="p.jsonl"), tmp_path / "answers.jsonl"
    with AnswersFile(answers, options) as file:
        file.write([Answer("0", "prompt", "fine", "stop", -1.0, 0.0, (), 3, 0.5)])
    with answers.open("a") as file:
        file.write(text + "\n")
    before = answers.read_bytes()
    assert f"{answers}: line 2 is not an answer (" in refused(lambda: AnswersFile(answers, options))
    assert answers.read_bytes() == before


def test_ids_that_cannot_be_looked_up_or_written_are_refused(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "\\ud800", "prompt": "Why?"}\n')
    assert "half a surrogate pair" in refused(lambda: load_prompts(prompts, get_form("plain")))
    options, answers = DecodeConfig(lm="lm", method="greedy", prompts="p.jsonl"), tmp_path / "answers.jsonl"
    with AnswersFile(answers, options):
        answers.write_text('{"id": ["a"], "prompt": "Why?"}\n')
    assert "line 1 is not an answer" in refused(lambda: AnswersFile(answers, options))


def test_a_file_of_metrics_keeps_what_can_be_read_of_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "split": "train", "loss": 0.5}) for step in (1, 2, 3)]
    path.write_bytes(
        "\n".join([good[0], "junk}", "{}", "3}", "[]", good[1], good[2]]).encode() + b'\n{"step": 4, "s\xff'
    )
    with pytest.warns(InputWarning, match="4 lines are not metrics of a step; they are dropped"):
        MetricsFile(path, 2).write(3, "train", {"loss": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    (tmp_path / "folder").mkdir()
    assert "cannot be written (Is a directory)" in refused(lambda: MetricsFile(tmp_path / "folder", 0))
