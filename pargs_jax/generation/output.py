"""Writes answers as JSONL, and continues a file that an earlier run left."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pargs_jax.config import DecodeConfig
from pargs_jax.config_files import from_mapping, read_yaml, to_yaml
from pargs_jax.data.preferences import Prompt
from pargs_jax.durable_files import append_all, opened_to_append, write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.generation.answers import Answer
from pargs_jax.generation.traces import TracesFile, one_or_all, write_in_order
from pargs_jax.json_text import parse_json
from pargs_jax.options import deciding_values


def answer_row(answer: Answer) -> dict[str, Any]:
    """An answer as a row of the output: `guide_reward` is a number for one reward model, a list for several."""
    row = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer) if field.name != "trace"}
    row["guide_reward"] = one_or_all(row.pop("guide_rewards"))
    if row["log_z"] is None:
        del row["log_z"]  # only particles have it
    return row


def answer_of_row(row: Mapping[str, Any]) -> Answer:
    """The reverse of `answer_row`; other fields of the row are ignored. Raises InputError if one is missing."""
    rewards = row.get("guide_reward")
    rewards = () if rewards is None else tuple(rewards) if isinstance(rewards, list) else (rewards,)
    names = {field.name for field in dataclasses.fields(Answer)} - {"guide_rewards", "trace"}
    try:
        return Answer(guide_rewards=rewards, **{name: row[name] for name in names & row.keys()})
    except TypeError as error:
        raise InputError(f"is not an answer ({error})") from error


def settings_path(path: Path) -> Path:
    """The file beside a file of answers that says how they were made."""
    return path.with_name(path.name + ".config.yaml")


def made_with(path: Path) -> DecodeConfig:
    """The config that a file of answers was made with. Raises InputError if decode.py did not make it."""
    settings = settings_path(path)
    if not settings.exists():
        raise InputError(f"{path}: already exists and was not written by decode.py; use another file")
    return from_mapping(DecodeConfig, read_yaml(settings), str(settings))


def settings_text(config: DecodeConfig) -> str:
    """What lies beside a file of answers: all options, and the numbers of the method where it uses its own."""
    numbers = config.numbers_in_effect
    return to_yaml(config) + (f"# in effect: {numbers}\n" if numbers else "")


class AnswersFile(AbstractContextManager):
    """Appends answers to a JSONL file as they end, and puts them in order at the end. Only one process may do so at a
    time.

    Next to `F.jsonl` is `F.jsonl.config.yaml`. A second run with the same options continues after the existing rows;
    with other options it is refused. Every row has a digest of its options, and its prompt: the same id with another
    prompt is refused too. A truncated last line is dropped and answered again.

    With the config's `trace`, the answers' traces are written to that file (`TracesFile`).
    """

    def __init__(self, path: Path, config: DecodeConfig) -> None:
        """Opens the file, or creates it.

        Raises InputError if it cannot be written, belongs to something else, or another process is writing it.
        """
        self._path = path
        self._options = options_digest(config)
        self._settings = settings_path(path)
        with opened_to_append(path, "decode.py", "use another file") as self._file:
            before = self._earlier_config(config)
            self._done = self._read_done(config, before)
            self._traces = self._open_traces(config, before)
            with write_errors_named_after(self._settings, "use another file"):
                write_whole(self._settings, settings_text(config))

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._traces is not None:
            self._traces.close()

    def answered(self, prompts: Sequence[Prompt], n: int = 1) -> list[list[bool]]:
        """Which of the n samples of each prompt have a row. Raises InputError if a row with a prompt's id answers
        another prompt."""
        for prompt in prompts:
            for sample in range(n):
                if self._done.get((prompt.id, sample), digest := _digest(prompt.text)) != digest:
                    raise InputError(
                        f"{self._path}: the row with the id {prompt.id!r} answers another prompt (without an id, a "
                        "prompt's line number is its id); use another file, or give every prompt its own id"
                    )
        return [[(prompt.id, sample) in self._done for sample in range(n)] for prompt in prompts]

    def write(self, answers: Sequence[Answer]) -> None:
        """Appends rows; the traces' rows first. Raises InputError if they cannot be written completely."""
        if self._traces is not None:
            self._traces.write([dataclasses.replace(answer.trace, options=self._options) for answer in answers])
        made = [answer_row(answer) | {"options": self._options} for answer in answers]
        rows = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in made)
        with write_errors_named_after(
            self._path, "earlier answers are safe; fix that, then run the same command again"
        ):
            append_all(self._file, rows)

    def put_in_order(self, prompts: Sequence[Prompt]) -> None:
        """Sorts the rows, and the traces, in the order of these prompts; rows of other prompts come first. Each file is
        replaced in one step, so a kill leaves every row where it was or where it belongs. Nothing can be written
        afterwards. Raises InputError if they cannot be written."""
        number = {prompt.id: number for number, prompt in enumerate(prompts)}

        def place(prompt_id: str, sample: int) -> tuple[int, int]:
            return (number[prompt_id], sample) if prompt_id in number else (-1, 0)

        if self._traces is not None:
            self._traces.put_in_order(place)
        with write_errors_named_after(self._path, "its answers are all there, in another order"):
            write_in_order(self._path, place)

    def _earlier_config(self, config: DecodeConfig) -> DecodeConfig | None:
        """The config of the run that made the file; None if there is nothing to continue."""
        has_rows = self._path.stat().st_size > 0
        # A run that was killed before its first answers may have left traces.
        if not has_rows and (config.trace is None or not self._settings.exists()):
            return None
        return made_with(self._path)

    def _read_done(self, config: DecodeConfig, before: DecodeConfig | None) -> dict[tuple[str, int], bytes]:
        """The digest of each answered prompt, by the prompt's id and the answer's sample."""
        content = self._path.read_bytes()
        if not content:
            return {}
        if before is None or deciding_values(before) != deciding_values(config):
            raise InputError(
                f"{self._path}: its rows were made with other options ({self._settings.name}); "
                "use the same options, or another file"
            )
        lines = content.split(b"\n")
        cut_off = lines.pop()
        done = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                answered = row["id"], row.get("sample", 0)
                digest, options = _digest(row["prompt"]), row.get("options")
                done[answered] = digest
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self._path}: line {number} is not an answer ({error!r}); use another file"
                ) from error
            if options not in (None, self._options):  # files of earlier versions have none
                raise InputError(
                    f"{self._path}: line {number} was not made with the options in {self._settings.name}; "
                    "use another file"
                )
        self._file.truncate(len(content) - len(cut_off))
        return done

    def _open_traces(self, config: DecodeConfig, before: DecodeConfig | None) -> TracesFile | None:
        if config.trace is None:
            return None
        is_known = before is not None and before.trace == config.trace
        return TracesFile(Path(config.trace), self._path, list(self._done), self._options, is_known=is_known)


def options_digest(config: DecodeConfig) -> str:
    """A short digest of the options that determine the answers."""
    return _digest(json.dumps(deciding_values(config), sort_keys=True)).hex()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
