"""Preference pairs, answers to imitate and prompts, from a local file or the hub.

Every row is brought to one shape, `Preference`. A row that cannot be is set aside with its line and the reason; a
source that gives nothing is an `InputError`.
"""

import csv
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pargs_jax.data.prompts import PromptForm, Turn
from pargs_jax.data.tokenization import TextTokenizer
from pargs_jax.data.tokenizer_files import HUB_ID
from pargs_jax.errors import InputError, first_line

_ANSWER_FIELDS = ("chosen", "response", "completion")
"""Where a row may hold the answer to imitate, first found first."""


@dataclass(frozen=True)
class Preference:
    """One prompt with the preferred answer and, unless only answers to imitate were asked for, the other one."""

    id: str
    prompt: str
    chosen: str
    rejected: str | None


@dataclass(frozen=True)
class Prompt:
    """One prompt to answer."""

    id: str
    text: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its line in a JSONL file, elsewhere its number, from 1, why, and what stands there."""

    line: int
    reason: str
    row: Any


@dataclass(frozen=True)
class LoadedPreferences:
    """The rows of a source: those that can be used, and those that cannot."""

    rows: list[Preference]
    bad_rows: list[BadRow]


class _SourceRow(NamedTuple):
    """What stands at one place of a source, and what is wrong with it already."""

    line: int
    content: Any
    problem: str = ""


def load_preferences(
    source: str | Path,
    form: PromptForm,
    *,
    tokenizer: TextTokenizer | None = None,
    require_rejected: bool = True,
    split: str = "train",
) -> LoadedPreferences:
    """Reads preference pairs, or answers to imitate, and writes their prompts in `form`.

    Each row may be
    - explicit: `prompt`, `chosen`, `rejected`;
    - implicit: `chosen` and `rejected` as whole texts, the prompt being what they share up to the form's last answer
      marker, or up to the last whitespace for forms without a marker;
    - conversational: the prompt a list of `{"role", "content"}`, the answers likewise, the turns before them or not;
    - where `require_rejected` is false also `prompt` with `response`, `completion` or `chosen`; `messages`; or `text`,
      which is an answer to the empty prompt.

    Args:
        source: a .jsonl, .jsonl.gz, .json, .csv or .parquet file, or a hub id.
        form: the prompt form.
        tokenizer: needed by the form `chat` alone, for its template.
        require_rejected: whether rows need a rejected answer; if not, `rejected` is None in all of them.
        split: which split to take of a data set from the hub.

    Raises:
        InputError: if the source is missing, unreadable or empty, or if all its rows are bad.
    """
    rows, bad_rows = [], []
    for row in _read_rows(source, split):
        try:
            rows.append(_preference(row, form, tokenizer, require_rejected))
        except InputError as error:
            bad_rows.append(BadRow(row.line, str(error), row.content))
    if not rows and not bad_rows:
        raise InputError(f"{source}: no rows in it")
    if not rows:
        first = bad_rows[0]
        raise InputError(f"{source}: none of its {len(bad_rows)} rows can be used; line {first.line}: {first.reason}")
    return LoadedPreferences(rows, bad_rows)


def write_bad_rows(path: str | Path, bad_rows: Sequence[BadRow]) -> None:
    """Writes bad rows as JSON lines of `line`, `reason` and `row`.

    Raises:
        InputError: if the file cannot be written.
    """
    try:
        # A lone surrogate has no UTF-8; the backslash escape in its place is the JSON it came from.
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            for bad_row in bad_rows:
                file.write(json.dumps(asdict(bad_row), ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def load_prompts(
    source: str | Path, form: PromptForm, tokenizer: TextTokenizer | None = None, *, split: str = "train"
) -> list[Prompt]:
    """Reads prompts to answer from the sources that `load_preferences` reads, and writes them in `form`.

    A row holds `prompt`, a text or a list of turns, or else `chosen` and `rejected` that share one, and may hold an
    `id`; the line number is the id of one that does not.

    Raises:
        InputError: if the source is missing, unreadable or empty, a row has no prompt, or two rows have the same id.
    """
    prompts: dict[str, Prompt] = {}
    for row in _read_rows(source, split):
        try:
            prompt = Prompt(_row_id(row), _prompt_text(_fields(row), form, tokenizer))
            _check_encodable(prompt.text)
        except InputError as error:
            raise InputError(f"{source}: line {row.line}: {error}") from error
        if prompt.id in prompts:
            raise InputError(
                f"{source}: line {row.line}: a row before it has the id {prompt.id!r} too; ids must differ"
            )
        prompts[prompt.id] = prompt
    if not prompts:
        raise InputError(f"{source}: no rows in it")
    return list(prompts.values())


# From a row to a preference. These functions raise InputError with the reason alone; the callers above add the place.


def _fields(row: _SourceRow) -> dict[str, Any]:
    if row.problem:
        raise InputError(row.problem)
    if not isinstance(row.content, dict):
        raise InputError(f"the row is of type {type(row.content).__name__}: it must be an object with named fields")
    return row.content


def _row_id(row: _SourceRow) -> str:
    named = _fields(row).get("id")
    return str(row.line if named is None else named)


def _preference(
    row: _SourceRow, form: PromptForm, tokenizer: TextTokenizer | None, require_rejected: bool
) -> Preference:
    fields = _fields(row)
    rejected = None
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
    if rejected is not None and not rejected.strip():
        raise InputError("the rejected answer is empty")
    if chosen == rejected:
        raise InputError("chosen and rejected are the same")
    for text in (prompt, chosen, rejected or ""):
        _check_encodable(text)
    return Preference(_row_id(row), prompt, chosen, rejected)


def _prompt_and_answer(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> tuple[str, str]:
    """The prompt and the answer to imitate. A rejected answer serves only to find an implicit prompt."""
    if fields.get("prompt") is not None:
        name = next((name for name in _ANSWER_FIELDS if fields.get(name) is not None), None)
        if name is None:
            raise InputError(
                f"no answer beside prompt: it must be called {', '.join(_ANSWER_FIELDS[:-1])} or {_ANSWER_FIELDS[-1]}"
            )
        return _explicit_answer(fields, name, form, tokenizer)
    if fields.get("messages") is not None:
        turns, answer = _split_conversation(fields, "messages")
        return form.render(turns, tokenizer), form.begin_answer(answer)
    if fields.get("text") is not None:
        return "", _text(fields, "text")
    return _implicit_pair(fields, form, tokenizer)[:2]


def _prompt_text(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> str:
    """The row's prompt, whether it stands alone or only inside its answers."""
    if fields.get("prompt") is None:
        return _implicit_pair(fields, form, tokenizer)[0]
    if isinstance(fields["prompt"], list):
        return form.render(fields["prompt"], tokenizer)
    return form.render_text(_text(fields, "prompt"), tokenizer)


def _explicit_answer(
    fields: dict[str, Any], name: str, form: PromptForm, tokenizer: TextTokenizer | None
) -> tuple[str, str]:
    """The prompt and the answer called `name`. An answer that is a whole conversation brings its own prompt."""
    if not isinstance(fields.get(name), list):
        return _prompt_text(fields, form, tokenizer), form.begin_answer(_text(fields, name))
    turns, answer = _split_conversation(fields, name)
    prompt = form.render(turns, tokenizer) if turns else _prompt_text(fields, form, tokenizer)
    return prompt, form.begin_answer(answer)


def _implicit_pair(fields: dict[str, Any], form: PromptForm, tokenizer: TextTokenizer | None) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer of a row that holds two whole texts, or two whole conversations."""
    if isinstance(fields.get("chosen"), list) and isinstance(fields.get("rejected"), list):
        turns, chosen = _split_conversation(fields, "chosen")
        other_turns, rejected = _split_conversation(fields, "rejected")
        if turns != other_turns:
            raise InputError("chosen and rejected do not answer the same prompt")
        return form.render(turns, tokenizer), form.begin_answer(chosen), form.begin_answer(rejected)
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    start = _answer_start(chosen, rejected, form)
    return chosen[:start], form.begin_answer(chosen[start:]), form.begin_answer(rejected[start:])


def _answer_start(chosen: str, rejected: str, form: PromptForm) -> int:
    """Where the answers begin in two whole texts that share a prompt."""
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (texts, not paths)
    if form.answer_marker:
        marker_at = shared.rfind(form.answer_marker)
        if marker_at < 0:
            raise InputError(f"no common prompt: chosen and rejected share no {form.answer_marker!r}")
        return marker_at + len(form.answer_marker)
    # The whitespace itself begins the answers: tokenizers join a space to the word after it.
    whole_words = re.match(r"(.*\S)\s", shared, re.DOTALL)
    if whole_words is None:
        raise InputError("no common prompt: chosen and rejected do not begin with the same words")
    return whole_words.end(1)


def _split_conversation(fields: dict[str, Any], name: str) -> tuple[list[Turn], str]:
    """The turns before the last answer of the conversation called `name`, and that answer."""
    turns = fields[name]
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise InputError(f"{name} must be a list of turns that ends with the assistant's")
    return turns[:-1], last["content"]


def _text(fields: dict[str, Any], name: str) -> str:
    if fields.get(name) is None:
        raise InputError(f"{name} is missing; the row has {', '.join(map(str, fields)) or 'no fields'}")
    if not isinstance(fields[name], str):
        raise InputError(f"{name} is of type {type(fields[name]).__name__}: it must be a text or a list of turns")
    return fields[name]


def _check_encodable(text: str) -> None:
    """JSON can spell out what no tokenizer takes: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"half a surrogate pair ({text[error.start]!r}) stands in the text: it is not Unicode"
        ) from error


# From a source to its rows.


def _read_rows(source: str | Path, split: str) -> Iterator[_SourceRow]:
    """The rows of a local file, or else of a hub data set (or a local folder laid out like one)."""
    path = Path(source)
    ending = next((ending for ending in _FILE_READERS if path.name.lower().endswith(ending)), None)
    if path.is_file():
        if ending is None:
            raise InputError(f"{source}: cannot read this kind of file; it must end in {', '.join(_FILE_READERS)}")
        try:
            yield from _FILE_READERS[ending](path)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{source}: cannot be read: {error}") from error
    elif path.is_dir() or (ending is None and HUB_ID.fullmatch(str(source))):
        yield from _hub_rows(str(source), split)
    else:
        raise InputError(f"{source}: no such file, and not a hub id such as Anthropic/hh-rlhf")


def _jsonl_rows(path: Path) -> Iterator[_SourceRow]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield _SourceRow(line, json.loads(raw.decode("utf-8-sig")))
            except UnicodeDecodeError:
                yield _SourceRow(line, raw.decode(errors="replace"), "the line is not UTF-8")
            except json.JSONDecodeError as error:
                yield _SourceRow(line, raw.decode(), f"the line is not JSON: {error.msg} at column {error.colno}")


def _json_rows(path: Path) -> Iterator[_SourceRow]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not JSON (one object a line is .jsonl): {error.msg} at line {error.lineno}"
        ) from error
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        raise InputError(f"{path}: must hold a list of rows, or an object with such a list called data")
    yield from map(_SourceRow, itertools.count(1), content)


def _csv_rows(path: Path) -> Iterator[_SourceRow]:
    csv.field_size_limit(2**31 - 1)  # Python's limit of 128 KiB a field is less than a long dialogue
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, fields in enumerate(csv.DictReader(file), start=1):
            problem = "the row has more values than there are columns" if None in fields else ""
            yield _SourceRow(number, fields, problem)


def _parquet_rows(path: Path) -> Iterator[_SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from error
    yield from map(_SourceRow, itertools.count(1), rows)


def _hub_rows(source: str, split: str) -> Iterator[_SourceRow]:
    import datasets  # slow to import

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises OSError, ValueError and its own errors here
        raise InputError(f"data set {source!r}, split {split!r}: {first_line(error)}") from error
    yield from map(_SourceRow, itertools.count(1), rows)


_FILE_READERS: dict[str, Callable[[Path], Iterator[_SourceRow]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
