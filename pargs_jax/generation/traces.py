"""The record of how an answer was decoded, token by token, and the file of such records.

Evaluation, the page that explains an answer, and callers of a `Session` use the same record (docs/traces.md).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pargs_jax.durable_files import append_all, opened_to_append, write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.json_text import parse_json


class TracedCandidate(NamedTuple):
    """A token that could have been chosen. `log_p` is its log-probability under the language model, and `log_q` under
    the distribution that the token was drawn from; both in nats. `log_q` is minus infinity for tokens that could not be
    drawn."""

    id: int
    text: str
    log_p: float
    log_q: float
    rewards: tuple[float, ...]


class TracedToken(NamedTuple):
    """A token of an answer.

    `text` is its part of the response (`shares_of`). `log_p` is its log-probability under the language model p, and
    `log_q` under the distribution q that it was drawn from; `entropy` is that of p, and `kl` is KL(q || p); all in
    nats. `rewards` are the guides'. `candidates`, present on request, are in decreasing order of `log_q`.
    """

    id: int
    text: str
    log_p: float
    log_q: float
    rewards: tuple[float, ...]
    entropy: float
    kl: float
    candidates: tuple[TracedCandidate, ...] | None = None


@dataclasses.dataclass(frozen=True)
class AnswerTrace:
    """An answer with all its tokens, and how it was decoded.

    Fields that an `Answer` has mean the same here. `weights`, `k` and `temperature` are the numbers in use: no weights
    without guidance, no k for a method that does not count its candidates, and no temperature for one that does not
    sample. `options` is the digest of the command's options, which the answers file has too; None for a `Session` in
    Python. `eos_ids` are the tokens that end an answer.
    """

    id: str
    sample: int
    prompt: str
    response: str
    finish_reason: str
    log_probability: float
    kl: float
    guide_rewards: tuple[float, ...]
    method: str
    weights: tuple[float, ...]
    k: int | None
    temperature: float | None
    seed: int
    lm: str
    reward_models: tuple[str, ...]
    eos_ids: tuple[int, ...]
    tokens: tuple[TracedToken, ...]
    options: str | None = None

    def as_row(self) -> dict[str, Any]:
        """The row of a trace file: minus infinity becomes null, and candidates that were not recorded are left out."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["guide_reward"] = one_or_all(row.pop("guide_rewards"))
        row["tokens"] = [token_row(token) for token in row.pop("tokens")]
        return row

    @classmethod
    def from_row(cls, row: Any) -> "AnswerTrace":
        """The trace in a row. Raises ValueError, with the reason, if it is not a trace."""
        try:
            rewards = row["guide_reward"]
            rewards = [] if rewards is None else rewards if isinstance(rewards, list) else [rewards]
            fields = {name: row[name] for name in cls.__dataclass_fields__ if name not in ("guide_rewards", "tokens")}
            lists = {name: tuple(fields[name]) for name in ("weights", "reward_models", "eos_ids")}
            tokens = tuple(map(_token_of, row["tokens"]))
            trace = cls(**fields | lists, guide_rewards=tuple(map(float, rewards)), tokens=tokens)
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        if "".join(token.text for token in trace.tokens) != trace.response:
            raise ValueError("the texts of its tokens do not add up to its response")
        return trace


def one_or_all(rewards: Sequence[float]) -> float | list[float] | None:
    """The `guide_reward` of a row: a number for one reward model, a list for several, null for none."""
    return None if not rewards else rewards[0] if len(rewards) == 1 else list(rewards)


def read_traces(path: str | Path) -> Iterator[AnswerTrace]:
    """Yields the traces in a file that `decode.py` wrote.

    Raises InputError if the file cannot be read, or one of its lines is not a trace.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    trace = AnswerTrace.from_row(parse_json(line))
                except ValueError as error:
                    raise InputError(
                        f"{path}: line {number} is not a trace ({error}); the option trace of decode.py writes them"
                    ) from error
                yield trace
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


class TracesFile:
    """Appends traces to a JSONL file, in the order of the answers file.

    Traces are written before their answers. A killed run may therefore leave traces without answers at the end of the
    file; they are dropped, and written again with their answers.
    """

    def __init__(
        self, path: Path, answers_path: Path, answered: Sequence[tuple[str, int]], options: str, *, is_known: bool
    ) -> None:
        """Opens the file, or creates it.

        Args:
            path: the trace file.
            answers_path: the answers file, for messages.
            answered: the id and sample of each row of the answers file.
            options: the digest of the options that they were made with.
            is_known: whether an earlier run wrote traces of these answers here.

        Raises InputError if it cannot be written, another process is writing it, or its lines are not the answers'
        traces.
        """
        self._path = path
        with opened_to_append(path, "decode.py", "use another file") as self._file:
            lines = path.read_bytes().splitlines(keepends=True)
            untraced = {(prompt_id, sample, options) for prompt_id, sample in answered}
            for number in range(len(answered)):
                found = _identity(lines[number]) if number < len(lines) else None
                if found not in untraced:
                    raise InputError(
                        f"{path}: line {number + 1} is not the trace of an answer in {answers_path}; answers made "
                        "without traces cannot get them later; use new files for both"
                    )
                untraced.remove(found)
            if len(lines) > len(answered) and not is_known:
                raise InputError(f"{path}: already exists, and does not belong to {answers_path}; use another file")
            for number, line in enumerate(lines[len(answered) :], start=len(answered) + 1):
                is_whole, found = line.endswith(b"\n"), _identity(line)
                if is_whole and (found is None or found[2] != options):
                    raise InputError(f"{path}: line {number} is not a trace of these answers; use another file")
            self._file.truncate(sum(map(len, lines[: len(answered)])))

    def close(self) -> None:
        """Closes the file, which releases its lock."""
        self._file.close()

    def write(self, traces: Sequence[AnswerTrace]) -> None:
        """Appends rows. Raises InputError if they cannot be written completely."""
        rows = "".join(json.dumps(trace.as_row(), ensure_ascii=False, allow_nan=False) + "\n" for trace in traces)
        with write_errors_named_after(self._path, "earlier traces are safe; fix that, then run the same command again"):
            append_all(self._file, rows)

    def put_in_order(self, place: Callable[[str, int], Any]) -> None:
        """Sorts the rows by the place of an id and a sample. Raises InputError if they cannot be written."""
        with write_errors_named_after(self._path, "its traces are all there, in another order"):
            write_in_order(self._path, place)


def write_in_order(path: Path, place: Callable[[str, int], Any]) -> None:
    """Sorts the rows of a file of answers or traces by the place of an id and a sample, in one step. Writes nothing if
    they are in order already. Raises OSError if they cannot be written."""
    lines = path.read_bytes().splitlines(keepends=True)
    rows = map(parse_json, lines)
    places = [place(row["id"], row.get("sample", 0)) for row in rows]
    order = sorted(range(len(lines)), key=places.__getitem__)
    if order != list(range(len(lines))):
        write_whole(path.resolve(), b"".join(lines[number] for number in order))


def _identity(line: bytes) -> tuple[str, int, str] | None:
    """The answer that a line traces, and the digest of its options; None if the line is not a complete trace."""
    try:
        row = parse_json(line)
        return row["id"], row["sample"], row["options"]
    except (ValueError, KeyError, TypeError):
        return None


def token_row(token: TracedToken) -> dict[str, Any]:
    """A token in the row of a trace file."""
    row = _numbers_row(token)
    if token.candidates is None:
        del row["candidates"]
    else:
        row["candidates"] = [_numbers_row(candidate) for candidate in token.candidates]
    return row


def _numbers_row(token: TracedToken | TracedCandidate) -> dict[str, Any]:
    return token._asdict() | {
        "log_p": _number(token.log_p),
        "log_q": _number(token.log_q),
        "rewards": [_number(reward) for reward in token.rewards],
    }


def _number(number: float) -> float | None:
    return None if number == -math.inf else number


def _token_of(row: dict[str, Any]) -> TracedToken:
    candidates = row.get("candidates")
    return TracedToken(
        *_numbers_of(row),
        entropy=float(row["entropy"]),
        kl=float(row["kl"]),
        candidates=None if candidates is None else tuple(TracedCandidate(*_numbers_of(each)) for each in candidates),
    )


def _numbers_of(row: dict[str, Any]) -> tuple[int, str, float, float, tuple[float, ...]]:
    if not isinstance(row["text"], str):
        raise TypeError(f"the text of a token is {row['text']!r}")
    log_p, log_q, *rewards = (
        -math.inf if number is None else float(number) for number in (row["log_p"], row["log_q"], *row["rewards"])
    )
    return int(row["id"]), row["text"], log_p, log_q, tuple(rewards)
