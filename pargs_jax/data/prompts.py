"""The one registry of prompt forms: how a question or a conversation becomes the text that a model continues.

Training, decoding and evaluation all take their form from here by name, so that a reward model is never asked about a
prompt written differently from those it learned on.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from pargs_jax.data.tokenization import TextTokenizer
from pargs_jax.errors import InputError

Turn = dict[str, str]
"""One turn of a conversation: `{"role": "system" | "user" | "assistant", "content": text}`."""


@dataclass(frozen=True)
class PromptForm:
    """A prompt form made of fixed markers.

    No prompt ends in a space: where a form has one between marker and answer, it is `answer_prefix`, because tokenizers
    join a space to the word after it.

    Attributes:
        name: what `--data.format` and `--format` call it.
        start: stands once, before the first turn.
        user_marker: stands before each thing the user says.
        answer_marker: stands before each answer, and so ends every prompt; empty if the form has none.
        answer_prefix: what every answer begins with.
        openings: how texts that are in the form already begin, whitespace aside.
    """

    name: str
    start: str = ""
    user_marker: str = ""
    answer_marker: str = ""
    answer_prefix: str = ""
    openings: tuple[str, ...] = ()

    def render(self, turns: Sequence[Turn], tokenizer: TextTokenizer | None = None) -> str:
        """The prompt of a conversation whose last turn is the user's. A system turn has no marker.

        Raises:
            InputError: if the turns are malformed, or this form cannot tell several turns apart.
        """
        check_turns(turns)
        if not self.answer_marker and len(turns) > 1:
            raise InputError(
                f"prompt form {self.name!r} cannot hold a conversation of {len(turns)} turns: use hh or chat"
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
        """The prompt of a single question. A text already in the form stays, less spaces after its last marker."""
        if not self.answer_marker:
            return text
        trimmed = text.rstrip(" ")
        if trimmed.endswith(self.answer_marker.strip()):
            return trimmed
        if text.lstrip().startswith(self.openings):
            return text.rstrip() + self.answer_marker
        return self.render([{"role": "user", "content": text}])

    def turns_of(self, prompt: str | Sequence[Turn], tokenizer: TextTokenizer | None = None) -> tuple[Turn, ...] | None:
        """The turns of a prompt that each model writes in a template of its own; None where all models read one text.

        Empty where the prompt is in the tokenizer's template already, so that its turns are not known.
        """
        return None

    def begin_answer(self, text: str) -> str:
        """The answer as it follows a prompt of this form: with `answer_prefix` in front if it lacks it."""
        return text if text.startswith(self.answer_prefix) else self.answer_prefix + text


@dataclass(frozen=True)
class ChatForm(PromptForm):
    """The tokenizer's own chat template."""

    def render(self, turns: Sequence[Turn], tokenizer: TextTokenizer | None = None) -> str:
        """As `PromptForm.render`; also raises `InputError` if no tokenizer is given or it has no template."""
        check_turns(turns)
        if tokenizer is None:
            raise InputError(f"prompt form {self.name!r} needs a tokenizer with a chat template: none was given")
        return tokenizer.render_chat(turns)

    def render_text(self, text: str, tokenizer: TextTokenizer | None = None) -> str:
        """As `PromptForm.render_text`: a text that has the template around it already stays as it is."""
        question = "<question>"
        before, _, after = self.render([{"role": "user", "content": question}], tokenizer).rpartition(question)
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text
        return self.render([{"role": "user", "content": text}], tokenizer)

    def turns_of(self, prompt: str | Sequence[Turn], tokenizer: TextTokenizer | None = None) -> tuple[Turn, ...] | None:
        """As `PromptForm.turns_of`."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        is_rendered = self.render_text(prompt, tokenizer) == prompt
        return () if is_rendered else ({"role": "user", "content": prompt},)


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises `InputError` unless these are turns of a conversation that ends with the user's."""
    if not turns:
        raise InputError("the conversation is empty: it needs a turn of the user")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise InputError(f"turn {number} of the conversation is not an object with the texts role and content")
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
        # PKU's SafeRLHF, whose models read the answer right after the colon.
        PromptForm(
            "saferlhf",
            start="BEGINNING OF CONVERSATION:",
            user_marker=" USER: ",
            answer_marker=" ASSISTANT:",
            openings=("BEGINNING OF CONVERSATION:",),
        ),
        ChatForm("chat"),
        PromptForm("plain"),
    )
}
"""Every prompt form by its name."""


def get_form(name: str) -> PromptForm:
    """The prompt form of that name.

    Raises:
        InputError: if there is none, naming the nearest.
    """
    if name not in PROMPT_FORMS:
        nearest = difflib.get_close_matches(name, PROMPT_FORMS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"unknown prompt form {name!r}: {hint}the forms are {', '.join(PROMPT_FORMS)}")
    return PROMPT_FORMS[name]
