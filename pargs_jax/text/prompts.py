"""Prompt forms: how a question or a conversation becomes the text that a model continues.

Training, decoding and evaluation look up their form here by name. A model remembers the form that it was trained with
(`choose_form`), so a prompt in another form gives a warning.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pargs_jax.errors import InputError, warn
from pargs_jax.text.tokenization import TextTokenizer

Turn = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True)
class PromptForm:
    """A prompt form made of fixed markers.

    No prompt ends in a space, because tokenizers join a space to the following word. Where a form has a space between
    marker and answer, it belongs to `answer_prefix`.

    Attributes:
        name: its name in the option `format`.
        start: written once, before the first turn.
        user_marker: written before each user turn.
        answer_marker: written before each answer, so every prompt ends in it; empty if the form has none.
        answer_prefix: the beginning of every answer.
        openings: the beginnings (without white space) by which a text is recognised as being in the form already.
    """

    name: str
    start: str = ""
    user_marker: str = ""
    answer_marker: str = ""
    answer_prefix: str = ""
    openings: tuple[str, ...] = ()

    def render(self, turns: Sequence[Turn], tokenizer: TextTokenizer | None = None) -> str:
        """The prompt of a conversation whose last turn is the user's. A system turn has no marker.

        Raises InputError if the turns are malformed, or this form cannot tell several turns apart.
        """
        check_turns(turns)
        if not self.answer_marker and len(turns) > 1:
            raise InputError(
                f"prompt format {self.name!r} cannot hold a conversation of {len(turns)} turns: use hh or chat"
            )
        text = self.start
        for turn in turns:
            if turn["role"] == "user":
                text += self.user_marker + turn["content"]
            elif turn["role"] == "assistant":
                text += self.answer_marker + self.begin_answer(turn["content"])
            else:
                text = " ".join(filter(None, (text, turn["content"])))
        return text + self.answer_marker

    def render_text(self, text: str, tokenizer: TextTokenizer | None = None) -> str:
        """The prompt of a single question. A text that is already in the form only loses spaces after its last
        marker."""
        if not self.answer_marker:
            return text
        trimmed = text.rstrip(" ")
        if trimmed.endswith(self.answer_marker.strip()):
            return trimmed
        if text.lstrip().startswith(self.openings):
            return text.rstrip() + self.answer_marker
        return self.render([{"role": "user", "content": text}])

    def turns_of(self, prompt: str | Sequence[Turn], tokenizer: TextTokenizer | None = None) -> tuple[Turn, ...] | None:
        """The turns of a prompt that each model renders in its own template; None where all models read the same text.

        Empty where the prompt is already in the tokenizer's template, so that its turns are not known.
        """
        return None

    def prompt_end(self, text: str, tokenizer: TextTokenizer | None = None) -> int | None:
        """Where the prompt ends in the common beginning of whole dialogues in this form; None if the text is not
        one."""
        if not self.answer_marker or not text.lstrip().startswith(self.openings):
            return None
        marker_at = text.rfind(self.answer_marker)
        return None if marker_at < 0 else marker_at + len(self.answer_marker)

    def begin_answer(self, text: str) -> str:
        """The answer as it follows a prompt of this form; `answer_prefix` is prepended if it is missing."""
        return text if text.startswith(self.answer_prefix) else self.answer_prefix + text


@dataclass(frozen=True)
class ChatForm(PromptForm):
    """The tokenizer's own chat template."""

    def render(self, turns: Sequence[Turn], tokenizer: TextTokenizer | None = None) -> str:
        """As `PromptForm.render`; also raises `InputError` if no tokenizer is given or it has no template."""
        check_turns(turns)
        if tokenizer is None:
            raise InputError(f"prompt format {self.name!r} needs a tokenizer with a chat template: none was given")
        return tokenizer.render_chat(turns)

    def render_text(self, text: str, tokenizer: TextTokenizer | None = None) -> str:
        """As `PromptForm.render_text`: a text that is already in the template is not changed."""
        before, after = self._around_question(tokenizer)
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text
        return self.render([{"role": "user", "content": text}], tokenizer)

    def turns_of(self, prompt: str | Sequence[Turn], tokenizer: TextTokenizer | None = None) -> tuple[Turn, ...] | None:
        """As `PromptForm.turns_of`."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        is_rendered = self.render_text(prompt, tokenizer) == prompt
        return () if is_rendered else ({"role": "user", "content": prompt},)

    def prompt_end(self, text: str, tokenizer: TextTokenizer | None = None) -> int | None:
        """As `PromptForm.prompt_end`, with the template's own marker between a question and its answer."""
        _, marker = self._around_question(tokenizer)
        marker_at = text.rfind(marker) if marker.strip() else -1
        return None if marker_at < 0 else marker_at + len(marker)

    def _around_question(self, tokenizer: TextTokenizer | None) -> tuple[str, str]:
        """The text that the template puts before a single question, and the text after it."""
        question = "<question>"
        before, _, after = self.render([{"role": "user", "content": question}], tokenizer).rpartition(question)
        return before, after


@dataclass(frozen=True)
class PlainForm(PromptForm):
    """No markers: every text stays as it is, and whole dialogues may be in any form that has markers."""

    def prompt_end(self, text: str, tokenizer: TextTokenizer | None = None) -> int | None:
        """As `PromptForm.prompt_end`, of the form that the text is in."""
        form = form_of_dialogue(text)
        return form and form.prompt_end(text)


def form_of_dialogue(text: str) -> PromptForm | None:
    """The form, among those with markers, of the common beginning of whole dialogues; None if it is in no such form."""
    forms = (form for form in PROMPT_FORMS.values() if form.answer_marker)
    return next((form for form in forms if form.prompt_end(text) is not None), None)


def turns_in(text: str) -> tuple[Turn, ...]:
    """The turns of a prompt that is written in a form with markers of both sides; any other text is one question."""
    for form in map(PROMPT_FORMS.get, ("hh", "shp", "saferlhf")):
        user, answer = form.user_marker.rstrip(), form.answer_marker.rstrip()
        lead = user[: len(user) - len(user.lstrip())]
        marked = lead + text.strip().removeprefix(form.start).lstrip()
        first, *parts = re.split(f"({re.escape(user)}|{re.escape(answer)})", marked)
        if len(parts) < 4 or parts[-2:] != [answer, ""]:
            continue
        roles = {user: "user", answer: "assistant"}
        system = [{"role": "system", "content": first.strip()}] if first.strip() else []
        said = zip(parts[:-2:2], parts[1:-2:2], strict=True)
        turns = (*system, *({"role": roles[marker], "content": content.strip()} for marker, content in said))
        if turns[-1]["role"] == "user":
            return turns
    return ({"role": "user", "content": text},)


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises `InputError` unless these are turns of a conversation that ends with the user's."""
    if not turns:
        raise InputError("the conversation is empty: it needs a user turn")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise InputError(f"turn {number} of the conversation must be an object with the texts role and content")
        if turn.get("role") not in ("system", "user", "assistant"):
            raise InputError(f"turn {number} has role {turn.get('role')!r}: it must be system, user or assistant")
    if turns[-1]["role"] != "user":
        raise InputError(f"the prompt's last turn is of role {turns[-1]['role']!r}: it must be the user's")


PROMPT_FORMS: dict[str, PromptForm] = {
    form.name: form
    for form in (
        # Anthropic's HH-RLHF, as published.
        PromptForm(
            "hh",
            user_marker="\n\nHuman: ",
            answer_marker="\n\nAssistant:",
            answer_prefix=" ",
            openings=("Human:",),
        ),
        # OpenAI's Reddit TL;DR: SUBREDDIT, TITLE and POST lines, then the summary.
        PromptForm(
            "tldr",
            user_marker="POST: ",
            answer_marker="\nTL;DR:",
            answer_prefix=" ",
            openings=("SUBREDDIT:", "TITLE:", "POST:"),
        ),
        # Stanford Human Preferences, as the published guided-decoding codes write it.
        PromptForm(
            "shp",
            user_marker=" Human: ",
            answer_marker=" Assistant:",
            answer_prefix=" ",
            openings=("Human:",),
        ),
        # PKU's SafeRLHF, whose models read the answer directly after the colon.
        PromptForm(
            "saferlhf",
            start="BEGINNING OF CONVERSATION:",
            user_marker=" USER: ",
            answer_marker=" ASSISTANT:",
            openings=("BEGINNING OF CONVERSATION:",),
        ),
        ChatForm("chat"),
        PlainForm("plain"),
    )
}
"""Every prompt form by its name."""


def get_form(name: str) -> PromptForm:
    """The prompt form with this name.

    Raises InputError if there is no such form; the message names the nearest.
    """
    if name not in PROMPT_FORMS:
        nearest = difflib.get_close_matches(name, PROMPT_FORMS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"unknown prompt format {name!r}: {hint}the formats are {', '.join(PROMPT_FORMS)}")
    return PROMPT_FORMS[name]


def choose_form(given: str | None, remembered: Sequence[Sequence[tuple[str | Path, str | None]]], option: str) -> str:
    """The name of the prompt form to use: the given one, else the one that models remember, else plain.

    Warns, by name, of models that were trained with another form.

    Args:
        given: the user's choice, if any.
        remembered: models' sources and the forms they remember, if any, in groups. The first group that remembers a
            form decides.
        option: the option that sets the form, for messages.

    Raises InputError if `given` is None and the deciding group disagrees or remembers an unknown form.
    """
    told = [[(source, name) for source, name in group if name is not None] for group in remembered]
    form = given
    if given is None:
        deciding = next(filter(None, told), [])
        if any(name != deciding[0][1] for _, name in deciding):
            each = ", ".join(f"{source} {name!r}" for source, name in deciding)
            raise InputError(f"the models were trained with different prompt formats: {each}; choose one with {option}")
        source, form = deciding[0] if deciding else ("", "plain")
        if form not in [*PROMPT_FORMS]:
            raise InputError(
                f"{source}: was trained with the unknown prompt format {form!r}; choose one of "
                f"{', '.join(PROMPT_FORMS)} with {option}"
            )
    others = [f"{source} was trained with {name!r}" for group in told for source, name in group if name != form]
    if others:
        warn(f"prompts are written in the format {form!r}, but {' and '.join(others)}")
    return form
