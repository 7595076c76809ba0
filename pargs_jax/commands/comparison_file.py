"""The file of the demo's comparison. A comparison that was stopped continues after the last whole method in it."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pargs_jax.commands.demo import true_reward
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.durable_files import append_all, opened_to_append, write_errors_named_after, write_whole
from pargs_jax.errors import InputError, input_errors_named_after
from pargs_jax.generation.answers import Answer
from pargs_jax.generation.output import answer_of_row, answer_row, made_with, settings_path, settings_text
from pargs_jax.json_text import parse_json
from pargs_jax.options import deciding_values

ANOTHER = "give another --out"


class ComparisonFile(AbstractContextManager):
    """Rows of answers, method after method, each with its method and true reward.

    Attributes:
        found: the answers of every method that an earlier run wrote, by the method's name.
    """

    found: Mapping[str, list[Answer]]

    def __init__(self, path: Path, config: DecodeConfig, prompts: Sequence[Prompt]) -> None:
        """Opens the file, or creates it; a method that is there only in part is dropped.

        Raises InputError if it cannot be written, belongs to something else, or another process is writing it.
        """
        self._path = path
        with opened_to_append(path, "decode.py", ANOTHER) as self._file:
            self.found = self._read(config, [prompt.id for prompt in prompts])
            with write_errors_named_after(path, ANOTHER):
                write_whole(settings_path(path), settings_text(config))

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, method: str, answers: Sequence[Answer]) -> None:
        """Appends a method's rows. Raises InputError if they cannot be written completely."""
        made = ({"method": method, **answer_row(answer), "true_reward": true_reward(answer)} for answer in answers)
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        with write_errors_named_after(self._path, "earlier methods are safe; fix that, then run this again"):
            append_all(self._file, rows)

    def _read(self, config: DecodeConfig, prompt_ids: list[str]) -> dict[str, list[Answer]]:
        content = self._path.read_bytes()
        if not content:
            return {}
        if deciding_values(made_with(self._path)) != deciding_values(config):
            raise InputError(f"{self._path}: its rows were made with other options; use the same ones, or {ANOTHER}")
        lines = content.split(b"\n")[:-1]  # the last one is empty, or was cut off
        found: dict[str, list[Answer]] = {}
        for number, line in enumerate(lines, start=1):
            with input_errors_named_after(f"{self._path}: line {number}"):
                row = parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("method"), str):
                    raise InputError(f"is not an answer of a comparison; {ANOTHER}")
                found.setdefault(row["method"], []).append(answer_of_row(row))
        last = next(reversed(found), None)
        if last is not None and len(found[last]) < len(prompt_ids):
            del found[last]
        for method, answers in found.items():
            if [answer.id for answer in answers] != prompt_ids:
                raise InputError(f"{self._path}: its rows of {method} answer other prompts; {ANOTHER}")
        whole = sum(map(len, found.values()))
        self._file.truncate(sum(len(line) + 1 for line in lines[:whole]))
        return found
