"""Answers as JSONL, and going on with a file that an earlier run left."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pargs_jax.cli import from_mapping, read_yaml, to_yaml
from pargs_jax.config import DecodeConfig
from pargs_jax.errors import InputError
from pargs_jax.generation.session import Answer

# Options that do not change what a row says, so that a second run may change them.
FREE_ON_CONTINUE = ("out", "prompts", "batch_size", "mesh", "limit", "unroll")


def answer_row(answer: Answer) -> dict[str, Any]:
    """An answer as a row of the output: `guide_reward` is a number for one reward model, a list for several."""
    row = dataclasses.asdict(answer)
    rewards = list(row.pop("guide_rewards"))
    row["guide_reward"] = None if not rewards else rewards[0] if len(rewards) == 1 else rewards
    return row


class AnswersFile:
    """Appends answers to a JSONL file, each batch as soon as it is done.

    Beside `F.jsonl` lies `F.jsonl.config.yaml`: a second run goes on after the rows that are there if its options are
    the same, and is refused if not. A last line that was cut off is dropped and answered again.
    """

    def __init__(self, path: Path, config: DecodeConfig) -> None:
        self._path = path
        self._settings = path.with_name(path.name + ".config.yaml")
        self.done_ids = self._read_done(config)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._settings.write_text(to_yaml(config))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another --out") from error

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, answers: Sequence[Answer]) -> None:
        self._file.writelines(json.dumps(answer_row(answer), ensure_ascii=False) + "\n" for answer in answers)
        self._file.flush()

    def _read_done(self, config: DecodeConfig) -> set[str]:
        if not self._path.exists():
            return set()
        if self._path.is_dir():
            raise InputError(f"{self._path}: is a folder; --out is a file")
        text = self._path.read_text(encoding="utf-8")
        if not text:
            return set()
        if not self._settings.exists():
            raise InputError(f"{self._path}: is there already and was not written by decode.py; give another --out")
        before = from_mapping(DecodeConfig, read_yaml(self._settings), str(self._settings))
        free = {name: getattr(config, name) for name in FREE_ON_CONTINUE}
        if dataclasses.replace(before, **free) != config:
            raise InputError(
                f"{self._path}: its rows were made with other options ({self._settings.name}); "
                "run with those, or give another --out"
            )
        whole, _, cut_off = text.rpartition("\n")
        if cut_off:
            self._path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        try:
            return {json.loads(line)["id"] for line in whole.splitlines()}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: holds a line that is no answer ({error}); give another --out") from error
