"""Answers as JSONL, and going on with a file that an earlier run left."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pargs_jax.config import DecodeConfig
from pargs_jax.config_files import from_mapping, read_yaml, to_yaml
from pargs_jax.data.preferences import Prompt
from pargs_jax.durable_files import append_all, hold, write_failures_named, write_whole
from pargs_jax.errors import InputError
from pargs_jax.generation.session import Answer
from pargs_jax.options import deciding_values


def answer_row(answer: Answer) -> dict[str, Any]:
    """An answer as a row of the output: `guide_reward` is a number for one reward model, a list for several."""
    row = dataclasses.asdict(answer)
    rewards = list(row.pop("guide_rewards"))
    row["guide_reward"] = None if not rewards else rewards[0] if len(rewards) == 1 else rewards
    return row


class AnswersFile:
    """Appends answers to a JSONL file, each batch as soon as it is done; no other process may at the same time.

    Beside `F.jsonl` lies `F.jsonl.config.yaml`: a second run goes on after the rows that are there if its options are
    the same, and is refused if not. Every row has a digest of the options that it was made with, and its prompt: the
    same id with another prompt is refused too. A last line that was cut off is dropped and answered again.
    """

    def __init__(self, path: Path, config: DecodeConfig) -> None:
        """Opens the file, or makes it.

        Raises:
            InputError: it cannot be written, belongs to something else, or another process is writing it.
        """
        self._path = path
        self._options = options_digest(config)
        self._settings = path.with_name(path.name + ".config.yaml")
        if path.is_dir():
            raise InputError(f"{path}: is a folder; --out is a file")
        with write_failures_named(path, "give another --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        try:
            hold(self._file, f"{path}: another decode.py is writing it; wait for it to end, or give another --out")
            self._done = self._read_done(config)
            with write_failures_named(self._settings, "give another --out"):
                write_whole(self._settings, to_yaml(config))
        except InputError:
            self._file.close()
            raise

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def answered(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Which of the prompts have a row. Raises InputError if the row of a prompt's id answers another prompt."""
        for prompt in prompts:
            if prompt.id in self._done and self._done[prompt.id] != _digest(prompt.text):
                raise InputError(
                    f"{self._path}: the row with the id {prompt.id!r} answers another prompt (a prompt without an id "
                    "has its line's number); give another --out, or prompts with ids of their own"
                )
        return [prompt.id in self._done for prompt in prompts]

    def write(self, answers: Sequence[Answer]) -> None:
        """Appends rows. Raises InputError if the disk does not take them all."""
        made = [answer_row(answer) | {"options": self._options} for answer in answers]
        rows = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in made)
        with write_failures_named(self._path, "the answers before are kept; mend that, then run the same again"):
            append_all(self._file, rows)

    def _read_done(self, config: DecodeConfig) -> dict[str, bytes]:
        """The digest of each answered prompt, by its id."""
        content = self._path.read_bytes()
        if not content:
            return {}
        if not self._settings.exists():
            raise InputError(f"{self._path}: is there already and was not written by decode.py; give another --out")
        before = from_mapping(DecodeConfig, read_yaml(self._settings), str(self._settings))
        if deciding_values(before) != deciding_values(config):
            raise InputError(
                f"{self._path}: its rows were made with other options ({self._settings.name}); "
                "run with those, or give another --out"
            )
        lines = content.split(b"\n")
        cut_off = lines.pop()
        done = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                prompt_id, digest, options = row["id"], _digest(row["prompt"]), row.get("options")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self._path}: line {number} is not an answer ({error!r}); give another --out"
                ) from error
            if options not in (None, self._options):  # files of earlier versions have none
                raise InputError(
                    f"{self._path}: line {number} was made with other options than {self._settings.name} says; "
                    "give another --out"
                )
            done[prompt_id] = digest
        self._file.truncate(len(content) - len(cut_off))
        return done


def options_digest(config: DecodeConfig) -> str:
    """A short digest of the options that decide what an answer is."""
    return _digest(json.dumps(deciding_values(config), sort_keys=True)).hex()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
