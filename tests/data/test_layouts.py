"""Rows as well-known data sets were published."""

import json

import pytest

from pargs_jax.data.layouts import LAYOUTS
from pargs_jax.data.preferences import is_held_out, load_preferences, load_prompts
from pargs_jax.errors import InputError
from pargs_jax.text.prompts import get_form

PLAIN, HH = get_form("plain"), get_form("hh")
SHP = {"post_id": "a1", "domain": "askbaking", "history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.",
       "labels": 1, "seconds_difference": 3.0, "score_A": 20, "score_B": 5}  # fmt: skip
WEBGPT = {"question": {"dataset": "eli5", "id": "q", "full_text": "Why?"}, "quotes_0": {}, "answer_0": "So.",
          "score_0": 0.5, "answer_1": "No.", "score_1": -0.5}  # fmt: skip
SAFE = {"prompt": "Why?", "response_0": "No.", "response_1": "So.", "is_response_0_safe": True,
        "better_response_id": 1, "safer_response_id": 0}  # fmt: skip
ORCA = {"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."}
SHARE_GPT = {
    "id": "s1",
    "conversations": [{"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "So."},
    "rejected": {"from": "gpt", "value": "No."},
}
PAIRS = {
    "SHP": SHP,
    "SHP, B better": SHP | {"labels": "0", "human_ref_A": "No.", "human_ref_B": "So."},
    "WebGPT comparisons": WEBGPT,
    "WebGPT, the second better": WEBGPT | {"answer_0": "No.", "answer_1": "So.", "score_0": -1, "score_1": 1.0},
    "PKU-SafeRLHF": SAFE,
    "Orca": ORCA,
    "ShareGPT": SHARE_GPT,
}


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", [PLAIN, HH])
def test_a_published_pair_is_the_same_as_an_explicit_one(write, name, form):
    (expected,) = load_preferences(write({"prompt": "Why?", "chosen": "So.", "rejected": "No."}), form).rows
    (found,) = load_preferences(write(PAIRS[name]), form).rows
    assert (found.prompt, found.chosen, found.rejected) == (expected.prompt, expected.chosen, expected.rejected)
    assert found.id == PAIRS[name].get("id", "1")
    (prompt,) = load_prompts(write(PAIRS[name]), form)
    assert prompt.text == expected.prompt


def test_there_is_a_pair_of_every_layout():
    assert LAYOUTS.keys() <= PAIRS.keys()


def test_a_shared_conversation_and_a_system_text_become_turns(write):
    conversation = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello."), ("human", "Why?"), ("gpt", "So.")]
    row = {"conversations": [{"from": who, "value": text} for who, text in conversation]}
    (found,) = load_preferences(write(row), HH, require_rejected=False).rows
    assert found.prompt == "Be kind.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    assert found.chosen == " So."
    (found,) = load_preferences(write(ORCA | {"system": "Be kind."}), HH).rows
    assert found.prompt == "Be kind.\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (SHP | {"labels": 2}, "labels is 2, must be 0 or 1"),
        (SHP | {"labels": None}, "labels is None, must be 0 or 1"),
        (SHP | {"history": None}, "prompt is missing"),
        (WEBGPT | {"score_0": 0.0, "score_1": 0.0}, "score_0 and score_1 are equal, so neither answer is better"),
        (WEBGPT | {"score_0": "high"}, "score_0 and score_1 are 'high' and -0.5, must be numbers"),
        (WEBGPT | {"question": {"full_text": 3}}, "prompt is of type int"),
        (SAFE | {"better_response_id": [1]}, "better_response_id is [1], must be 0 or 1"),
        (ORCA | {"system": 3}, "turn 1 of the conversation must be"),
        (SHARE_GPT | {"conversations": "Why?"}, "conversations must be a list of turns with from and value"),
        (SHARE_GPT | {"conversations": [{"from": ["gpt"], "value": "x"}]}, "a turn of a conversation must have"),
        (SHARE_GPT | {"rejected": {"from": "gpt"}}, "a turn of a conversation must have"),
        (SHARE_GPT | {"rejected": None}, "rejected is missing"),
    ],
)
def test_a_published_row_that_says_nothing_is_a_bad_row(write, row, reason):
    loaded = load_preferences(write({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, row), PLAIN)
    (bad,) = loaded.bad_rows
    assert bad.reason.startswith(reason) and bad.row == row and len(loaded.rows) == 1


def test_an_empty_rejected_answer_is_a_valid_pair(write):
    dialogue = "\n\nHuman: Why?\n\nAssistant:"
    rows = [{"prompt": "Why?", "chosen": "So.", "rejected": ""}, {"chosen": f"{dialogue} So.", "rejected": dialogue}]
    loaded = load_preferences(write(*rows), HH)
    assert [(row.prompt, row.chosen, row.rejected) for row in loaded.rows] == [(dialogue, " So.", " ")] * 2
    assert load_preferences(write(rows[0]), PLAIN).rows[0].rejected == ""


def test_a_text_file_has_a_prompt_in_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffWhy?\r\n\n  How é?\n".encode())
    assert [(prompt.id, prompt.text) for prompt in load_prompts(path, PLAIN)] == [("1", "Why?"), ("3", "  How é?")]
    with pytest.raises(InputError, match="none of its 2 rows can be used; line 1: chosen is missing"):
        load_preferences(path, PLAIN)


def test_rows_are_held_out_by_prompt_and_always_the_same_ones(write):
    rows = [{"prompt": f"Why {i // 2}?", "chosen": f"So {i}.", "rejected": "No."} for i in range(400)]
    pairs = load_preferences(write(*rows), PLAIN).rows
    held = [row for row in pairs if is_held_out(row, 0.25)]
    assert 70 < len(held) < 130
    assert {row.prompt for row in held}.isdisjoint(row.prompt for row in pairs if not is_held_out(row, 0.25))
