"""Prompt forms: the published texts, and texts that are in a form already."""

import dataclasses
import warnings

import pytest

from pargs_jax.errors import InputError, InputWarning
from pargs_jax.text.prompts import PROMPT_FORMS, choose_form, get_form, turns_in

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
]
EXPECTED = {
    "hh": "\n\nHuman: Why?\n\nAssistant:",
    "tldr": "POST: Why?\nTL;DR:",
    "shp": " Human: Why? Assistant:",
    "saferlhf": "BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:",
    "plain": "Why?",
    "chat": "<user>Why?<assistant>",
}


class TemplateTokenizer:
    """Stands in for a tokenizer with a chat template."""

    def render_chat(self, turns):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


@pytest.mark.parametrize("name", PROMPT_FORMS)
def test_a_question_is_rendered_once(name):
    form = get_form(name)
    prompt = form.render_text("Why?", TemplateTokenizer())
    assert prompt == EXPECTED[name] == form.render(TURNS[-1:], TemplateTokenizer())
    assert form.render_text(prompt, TemplateTokenizer()) == prompt


def test_a_conversation_keeps_its_turns():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    assert get_form("hh").render(TURNS) == dialogue == get_form("hh").render_text(dialogue)
    system = {"role": "system", "content": "Be kind."}
    assert get_form("hh").render([system, *TURNS]) == "Be kind." + dialogue
    assert get_form("saferlhf").render([system, TURNS[0]]) == (
        "BEGINNING OF CONVERSATION: Be kind. USER: Hi ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        ("hh", "\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        ("hh", "\n\nHuman: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        (
            "tldr",
            "SUBREDDIT: r/cats\nTITLE: Cat\nPOST: It sat.\n",
            "SUBREDDIT: r/cats\nTITLE: Cat\nPOST: It sat.\nTL;DR:",
        ),
        ("plain", "Why? ", "Why? "),
    ],
)
def test_a_text_in_the_form_gets_only_what_it_lacks(name, text, prompt):
    assert get_form(name).render_text(text) == prompt


def test_answers_get_their_prefix_once():
    assert get_form("hh").begin_answer("Yes") == get_form("hh").begin_answer(" Yes") == " Yes"
    assert get_form("plain").begin_answer("Yes") == "Yes"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "empty"),
        (TURNS[:2], "must be the user's"),
        ([{"role": "bot", "content": "Hi"}], "role 'bot'"),
        ([{"role": "user", "content": 3}], "turn 1"),
        (["Hi"], "turn 1"),
    ],
)
def test_malformed_conversations_are_errors(turns, reason):
    with pytest.raises(InputError, match=reason):
        get_form("hh").render(turns)


def test_forms_say_what_they_need():
    with pytest.raises(InputError, match="cannot hold a conversation of 3 turns"):
        get_form("plain").render(TURNS)
    with pytest.raises(InputError, match="needs a tokenizer"):
        get_form("chat").render(TURNS)
    with pytest.raises(InputError, match="did you mean 'saferlhf'"):
        get_form("safe_rlhf")
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_form("hh").name = "other"


A, B, LM = ("runs/a", "hh"), ("runs/b", "tldr"), ("runs/sft", "shp")
SILENT = ("gpt2", None)


@pytest.mark.parametrize(
    ("given", "remembered", "form", "warned"),
    [
        (None, [], "plain", None),
        (None, [[], [SILENT]], "plain", None),
        (None, [[A], [SILENT]], "hh", None),
        (None, [[SILENT, A], [SILENT]], "hh", None),
        (None, [[SILENT], [LM]], "shp", None),
        (None, [[A], [LM]], "hh", "format 'hh', but runs/sft was trained with 'shp'"),
        ("hh", [[A], [SILENT]], "hh", None),
        (
            "tldr",
            [[A, B], [LM]],
            "tldr",
            "'tldr', but runs/a was trained with 'hh' and runs/sft was trained with 'shp'",
        ),
        ("plain", [[("runs/c", "xml")]], "plain", "format 'plain', but runs/c was trained with 'xml'"),
    ],
)
def test_the_form_is_the_one_that_was_given_or_else_remembered(given, remembered, form, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose_form(given, remembered, "--format") == form
    messages = [str(each.message) for each in caught if each.category is InputWarning]
    assert len(messages) == (warned is not None)
    assert all(message.endswith(warned) for message in messages)


@pytest.mark.parametrize(
    ("remembered", "message"),
    [
        ([[A, B]], "different prompt formats: runs/a 'hh', runs/b 'tldr'; choose one with --format"),
        ([[("runs/c", "xml")]], "runs/c: was trained with the unknown prompt format 'xml'; choose one of hh, "),
        ([[("runs/c", ["hh"])]], "unknown prompt format"),
        ([[("runs/c", "")]], "unknown prompt format"),
    ],
)
def test_forms_that_do_not_agree_or_are_not_known_are_one_line(remembered, message):
    with pytest.raises(InputError, match=message):
        choose_form(None, remembered, "--format")


@pytest.mark.parametrize("name", ["hh", "shp", "saferlhf"])
def test_turns_are_read_back_from_the_text_of_a_conversation(name):
    form = get_form(name)
    turns = [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "No\nway"},
    ]  # fmt: skip
    assert list(turns_in(form.render(turns))) == turns
    assert list(turns_in(form.render(turns[:1]).lstrip())) == turns[:1]
    system = {"role": "system", "content": "Be kind."}
    if name == "hh":
        assert list(turns_in(form.render([system, *turns]))) == [system, *turns]


@pytest.mark.parametrize("text", ["", "Why?", "POST: x\nTL;DR:", "\n\nHuman: unfinished", "Assistant:"])
def test_other_texts_are_one_question(text):
    assert turns_in(text) == ({"role": "user", "content": text},)
