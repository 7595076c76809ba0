"""Preference pairs, answers to imitate, scored answers and prompts, from a local file or the hub.

Every row is converted to a `Preference`. A row that cannot be converted is set aside with its line and the reason. A
source without usable rows raises `InputError`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pargs_jax.data.layouts import with_our_columns
from pargs_jax.data.sources import Rows, SourceRow
from pargs_jax.errors import InputError
from pargs_jax.text.prompts import PromptForm, Turn, form_of_dialogue
from pargs_jax.text.tokenization import TextTokenizer

_ANSWER_FIELDS = ("chosen", "response", "completion")
"""Columns that may hold the answer to imitate; the first one found is used."""
_REWARD_FIELDS = ("reward", "guide_reward")
"""Columns that may hold the reward of the answer; the first one found is used."""


@dataclass(frozen=True)
class Preference:
    """One prompt with the preferred answer and the rejected one (None when only single answers were asked for).

    A scored answer is in `chosen`, and `reward` is its reward. `finished` is false if the answer was cut off before its
    end-of-sequence token. `labels` are those of a pair that was judged by several objectives: 1 where `chosen` is
    better, 0 where `rejected` is.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str | None
    reward: float | None = None
    finished: bool = True
    labels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer, as the language model reads it.

    `turns` is the conversation that other models render in their own templates. It is None where all models read
    `text`, and empty where the turns are not known (see `PromptForm.turns_of`). `weights` and `preference` are the
    prompt's own reward weights and preference vector, if it has them.
    """

    id: str
    text: str
    turns: tuple[Turn, ...] | None = None
    weights: tuple[float, ...] | None = None
    preference: tuple[float, ...] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its line (in files other than JSONL, its number, from 1), the reason, and its
    content."""

    line: int
    reason: str
    row: Any
    lacks_column: bool = field(default=False, compare=False)

    def text(self) -> str:
        """The row as a line of JSON: `line`, `reason` and `row`."""
        shown = {"line": self.line, "reason": self.reason, "row": self.row}
        return json.dumps(shown, ensure_ascii=False, default=str) + "\n"


@dataclass(frozen=True)
class LoadedPreferences:
    """The rows of a source: usable ones and bad ones.

    `other_splits` counts the rows that were left out because their column `split` names another split.
    """

    rows: list[Preference]
    bad_rows: list[BadRow]
    other_splits: int = 0


class _MissingColumn(InputError):
    """A row lacks a required column, which may be there under another name."""

    def __init__(self, problem: str, fields: Mapping[str, Any]) -> None:
        super().__init__(f"{problem}; the row has {', '.join(map(str, fields)) or 'no fields'}")


def load_preferences(
    source: str | Path,
    form: PromptForm,
    *,
    tokenizer: TextTokenizer | None = None,
    require_rejected: bool = True,
    reward_range: tuple[float, float] | None = None,
    labels: int = 0,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> LoadedPreferences:
    """Reads preference pairs, answers to imitate, or scored answers, and writes their prompts in `form`.

    Each row may be
    - explicit: `prompt`, `chosen`, `rejected`; the rejected answer may be empty;
    - implicit: `chosen` and `rejected` are whole dialogues in `form` (with `plain`, in any form that has markers); the
      prompt is what they share up to the last answer marker;
    - conversational: the prompt is a list of `{"role", "content"}`; so are the answers, with or without the turns
      before them;
    - as it was published (`pargs_jax.data.layouts`): SHP, WebGPT comparisons, PKU-SafeRLHF, ShareGPT, Orca;
    - if `require_rejected` is false, also: `prompt` with `response`, `completion` or `chosen`; `messages`; or `text`,
      which is an answer to the empty prompt;
    - with `labels`, also: `labels`, a list of that many numbers from 0 to 1, one for each objective: 1 where `chosen`
      is better, 0 where `rejected` is;
    - with a `reward_range`: an answer in one of these shapes with its `reward`, a finite number; or a row that
      `decode.py` wrote with one reward model, where `guide_reward` is the reward. Such an answer is not changed, and
      has no end-of-sequence token if its `finish_reason` is `length`.

    Args:
        source: a .jsonl, .jsonl.gz, .json, .csv or .parquet file, or a hub id.
        form: the prompt form.
        tokenizer: needed only by the form `chat`, for its template.
        require_rejected: whether rows need a rejected answer; if not, `rejected` is None in all of them.
        reward_range: the lowest and the highest reward that a scored answer may have; None: rewards are not read.
        labels: the number of labels that a pair must have; 0: labels are not read.
        split: `train` or `eval`. It selects rows of a file that has a column `split`, and the split of a data set on
            the hub (see `Rows`).
        columns: the source's names for columns that it names differently, such as `{"prompt": "question"}`.

    Raises InputError if the source is missing, unreadable or empty, if all its rows are bad, or if `split` or `columns`
    do not match the source.
    """
    rows = Rows(source, split, columns or {})
    preferences, bad_rows = [], []
    for found in read_preferences(rows, form, tokenizer, require_rejected, reward_range, labels):
        (bad_rows if isinstance(found, BadRow) else preferences).append(found)
    if not preferences:
        raise no_usable_rows(source, len(bad_rows), bad_rows[0] if bad_rows else None)
    return LoadedPreferences(preferences, bad_rows, rows.census.other_splits)


def read_preferences(
    rows: Rows,
    form: PromptForm,
    tokenizer: TextTokenizer | None = None,
    require_rejected: bool = True,
    reward_range: tuple[float, float] | None = None,
    labels: int = 0,
) -> Iterator[Preference | BadRow]:
    """Reads what `load_preferences` loads, row by row. Raises InputError as iterating over `rows` does."""
    for row in rows:
        try:
            if reward_range is None:
                found = _preference(row, form, tokenizer, require_rejected, labels)
            else:
                found = _scored_answer(row, form, tokenizer, reward_range)
        except InputError as error:
            found = BadRow(row.line, str(error), row.content, isinstance(error, _MissingColumn))
        yield found


def no_usable_rows(source: str | Path, count: int, first: BadRow | None) -> InputError:
    """The error of a source without usable rows, of which the first bad one is given."""
    if first is None:
        return InputError(f"{source}: no rows in it")
    hint = "; the option columns maps other names, such as prompt=question" if first.lacks_column else ""
    return InputError(f"{source}: none of its {count} rows can be used; line {first.line}: {first.reason}{hint}")


def is_held_out(row: Preference, share: float) -> bool:
    """Whether a row belongs to the share that is held out to evaluate on.

    A hash of the prompt decides. So rows with the same prompt stay together, and every run divides them alike.
    """
    number = int.from_bytes(hashlib.blake2b(row.prompt.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64


def write_bad_rows(path: str | Path, rows: Sequence[BadRow]) -> None:
    """Writes bad rows as JSON lines of `line`, `reason` and `row`. Raises OSError if the file cannot be written."""
    # A lone surrogate has no UTF-8 form; the backslash escape in its place is how the JSON spelled it.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(row.text() for row in rows)


def load_prompts(
    source: str | Path,
    form: PromptForm,
    tokenizer: TextTokenizer | None = None,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Reads prompts to answer from the sources that `load_preferences` reads, and writes them in `form`.

    A row holds `prompt` (a text or a list of turns), or else `chosen` and `rejected` that share one. It may hold an
    `id` (the default is its line number), and `weights` and `preference`, which are lists of numbers. With a `split`,
    `train` or `eval`, only its rows are read (see `Rows`).

    Raises InputError if the source is missing, unreadable or empty, a row has no prompt, or two rows have the same id.
    """
    prompts: dict[str, Prompt] = {}
    for row in list(Rows(source, split, columns or {})):
        try:
            fields = _fields(row)
            text = _prompt_text(fields, form, tokenizer)
            written = _conversation(fields)
            turns = form.turns_of(text if written is None else written, tokenizer)
            prompt = Prompt(_row_id(row), text, turns, _numbers(fields, "weights"), _numbers(fields, "preference"))
            _check_encodable(prompt.text)
        except InputError as error:
            missing = isinstance(error, _MissingColumn)
            hint = "; the option columns maps other names, such as prompt=question" if missing else ""
            raise InputError(f"{source}: line {row.line}: {error}{hint}") from error
        if prompt.id in prompts:
            raise InputError(
                f"{source}: line {row.line}: an earlier row also has the id {prompt.id!r}; ids must differ"
            )
        prompts[prompt.id] = prompt
    if not prompts:
        raise InputError(f"{source}: no rows in it")
    return list(prompts.values())


# From a row to a preference. These functions raise InputError with only the reason; their callers add the place.


def _fields(row: SourceRow) -> dict[str, Any]:
    if row.problem:
        raise InputError(row.problem)
    if not isinstance(row.content, dict):
        raise InputError(f"the row is of type {type(row.content).__name__}, must be an object with named fields")
    return with_our_columns(row.content)


def _numbers(fields: dict[str, Any], name: str) -> tuple[float, ...] | None:
    """An optional column with a list of numbers."""
    found = fields.get(name)
    if found is None:
        return None
    if not isinstance(found, list) or not found or not all(_is_number(x) for x in found):
        raise InputError(f"{name}: got {found!r}, must be a list of numbers")
    return tuple(map(float, found))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _row_id(row: SourceRow) -> str:
    named = _fields(row).get("id")
    _check_encodable(text := str(row.line if named is None else named))
    return text


def _preference(
    row: SourceRow, form: PromptForm, tokenizer: TextTokenizer | None, require_rejected: bool, labels: int
) -> Preference:
    fields = _fields(row)
    rejected = None
    if require_rejected and "chosen" not in fields and fields.keys() & set(_REWARD_FIELDS):
        raise InputError("the row is a scored answer, must be a pair: prompt, chosen, rejected")
    if not require_rejected:
        prompt, chosen = _prompt_and_answer(fields, form, tokenizer)
    elif fields.get("prompt") is None:
        prompt, chosen, rejected = _implicit_pair(fields, form, tokenizer)
    else:
        prompt, chosen = _explicit_answer(fields, "chosen", form, tokenizer)
        other_prompt, rejected = _explicit_answer(fields, "rejected", form, tokenizer)
        if other_prompt != prompt:
            raise InputError("chosen and rejected do not answer the same prompt")
    if not chosen.strip():
        raise InputError("the chosen answer is empty")
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    for text in (prompt, chosen, rejected or ""):
        _check_encodable(text)
    return Preference(_row_id(row), prompt, chosen, rejected, labels=_labels(fields, labels))


def _labels(fields: dict[str, Any], count: int) -> tuple[float, ...] | None:
    """The labels of a pair, if it must have some."""
    if not count:
        return None
    found = _numbers(fields, "labels")
    if found is None:
        raise _MissingColumn("labels is missing", fields)
    if len(found) != count:
        raise InputError(f"labels: got {len(found)}, must be {count}, one for each objective (objective.labels)")
    if not all(0 <= label <= 1 for label in found):
        raise InputError(f"labels: got {list(found)}, each must be from 0 to 1")
    return found


def _scored_answer(
    row: SourceRow, form: PromptForm, tokenizer: TextTokenizer | None, reward_range: tuple[float, float]
) -> Preference:
    fields = _fields(row)
    if fields.get("rejected") is not None:
        raise InputError("the row is a pair, must be a scored answer: prompt, response, reward")
    reward = _reward(fields, *reward_range)
    if "guide_reward" in fields:
        prompt, answer = _prompt_text(fields, form, tokenizer), _text(fields, "response")
    else:
        prompt, answer = _prompt_and_answer(fields, form, tokenizer)
    if not answer.strip():
        raise InputError("the answer is empty")
    for text in (prompt, answer):
        _check_encodable(text)
    return Preference(_row_id(row), prompt, answer, None, reward, fields.get("finish_reason") != "length")


def _reward(fields: dict[str, Any], least: float, most: float) -> float:
    """The reward of a scored answer."""
    name = next((name for name in _REWARD_FIELDS if fields.get(name) is not None), None)
    if name is None:
        raise _MissingColumn("reward is missing", fields)
    value = fields[name]
    if isinstance(value, list):
        raise InputError(f"{name} is {len(value)} numbers; a scored answer has one, so decode with one reward model")
    try:
        reward = math.nan if isinstance(value, bool) else float(value)  # CSV files hold texts
    except (TypeError, ValueError, OverflowError):
        reward = math.nan
    if not math.isfinite(reward):
        raise InputError(f"{name} is {value!r}, must be a finite number")
    if not least <= reward <= most:
        raise InputError(f"{name} is {reward:g}, must be from {least:g} to {most:g} for this objective")
    return reward


def _prompt_and_answer(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> tuple[str, str]:
    """The prompt and the answer to imitate. A rejected answer is used only to find an implicit prompt."""
    if fields.get("prompt") is not None:
        name = next((name for name in _ANSWER_FIELDS if fields.get(name) is not None), None)
        if name is None:
            names = f"{', '.join(_ANSWER_FIELDS[:-1])} or {_ANSWER_FIELDS[-1]}"
            raise _MissingColumn(f"the row has a prompt but no answer, in a column {names}", fields)
        return _explicit_answer(fields, name, form, tokenizer)
    if fields.get("messages") is not None:
        turns, answer = _split_conversation(fields, "messages")
        return form.render(turns, tokenizer), form.begin_answer(answer)
    if fields.get("text") is not None:
        return "", _text(fields, "text")
    _require_pair(fields)
    return _implicit_pair(fields, form, tokenizer)[:2]


def _prompt_text(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> str:
    """The row's prompt: its own column, or the part that its answers share."""
    if fields.get("prompt") is None:
        _require_pair(fields)
        return _implicit_pair(fields, form, tokenizer)[0]
    if isinstance(fields["prompt"], list):
        return form.render(fields["prompt"], tokenizer)
    return form.render_text(_text(fields, "prompt"), tokenizer)


def _conversation(fields: dict[str, Any]) -> str | list[Turn] | None:
    """The question or turns that a row's prompt is rendered from; None where the prompt is part of a whole text."""
    if fields.get("prompt") is not None:
        return fields["prompt"]
    return _split_conversation(fields, "chosen")[0] if isinstance(fields.get("chosen"), list) else None


def _explicit_answer(
    fields: dict[str, Any], name: str, form: PromptForm, tokenizer: TextTokenizer | None
) -> tuple[str, str]:
    """The prompt and the answer called `name`. If the answer is a whole conversation, it contains the prompt."""
    if not isinstance(fields.get(name), list):
        return _prompt_text(fields, form, tokenizer), form.begin_answer(_text(fields, name))
    turns, answer = _split_conversation(fields, name)
    prompt = form.render(turns, tokenizer) if turns else _prompt_text(fields, form, tokenizer)
    return prompt, form.begin_answer(answer)


def _require_pair(fields: dict[str, Any]) -> None:
    """Raises InputError for a row without a prompt, unless it has two answers that share one."""
    if fields.get("chosen") is None or fields.get("rejected") is None:
        raise _MissingColumn("prompt is missing", fields)


def _implicit_pair(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of a row that holds two whole texts or two whole conversations."""
    if isinstance(fields.get("chosen"), list) and isinstance(fields.get("rejected"), list):
        turns, chosen = _split_conversation(fields, "chosen")
        other_turns, rejected = _split_conversation(fields, "rejected")
        if turns != other_turns:
            raise InputError("chosen and rejected do not answer the same prompt")
        if not turns:
            raise _MissingColumn("prompt is missing, and chosen and rejected do not contain one", fields)
        return form.render(turns, tokenizer), form.begin_answer(chosen), form.begin_answer(rejected)
    missing = [name for name in ("prompt", "chosen", "rejected") if fields.get(name) is None]
    if len(missing) > 1:
        raise _MissingColumn(f"{', '.join(missing[:-1])} and {missing[-1]} are missing", fields)
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    start = _answer_start(chosen, rejected, form, tokenizer)
    if start is None:
        raise _MissingColumn("prompt is missing, and chosen and rejected are not dialogues that share one", fields)
    return chosen[:start], form.begin_answer(chosen[start:]), form.begin_answer(rejected[start:])


def _answer_start(chosen: str, rejected: str, form: PromptForm, tokenizer: TextTokenizer | None) -> int | None:
    """Where the answers begin in two whole dialogues that share a prompt; None if they are not such dialogues."""
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (texts, not paths)
    start = form.prompt_end(shared, tokenizer)
    other = form_of_dialogue(shared)
    if start is None and other is not None:
        raise InputError(f"chosen and rejected are dialogues in the prompt format {other.name!r}, not {form.name!r}")
    return start


def _split_conversation(fields: dict[str, Any], name: str) -> tuple[list[Turn], str]:
    """The turns before the last answer of the conversation called `name`, and that answer."""
    turns = fields[name]
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise InputError(f"{name} must be a list of turns that ends with an assistant turn")
    return turns[:-1], last["content"]


def _text(fields: dict[str, Any], name: str) -> str:
    if fields.get(name) is None:
        raise _MissingColumn(f"{name} is missing", fields)
    if not isinstance(fields[name], str):
        raise InputError(f"{name} is of type {type(fields[name]).__name__}, must be a text or a list of turns")
    return fields[name]


def _check_encodable(text: str) -> None:
    """Raises InputError for half of a surrogate pair: JSON can spell it, but no tokenizer accepts it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text contains half a surrogate pair ({text[error.start]!r}), so it is not valid Unicode"
        ) from error
