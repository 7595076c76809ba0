"""Examples in files: written one after the other, mapped into memory when they are read.

A part is a folder with two or more files of plain numbers, little-endian:
    tokens       of every example: the prompt, the answers, then, if prefixes have their own ids, the length of each and
                 the ids of each; 16 bits for each number if all fit, else 32
    lengths      of every example, 32 bits each: how many numbers it has in `tokens`, the lengths of the prompt and of
                 the answers, and how many prefixes each answer has
    rewards, labels   of every example, float32, if examples have them
Files are checked by their size and a checksum before they are used, so that one that was cut or altered is noticed.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int

from pargs_jax.data.examples import Example, Lengths
from pargs_jax.durable_files import flush_to_disk

_BLOCK = 2**20
_DTYPES = {"lengths": "<i4", "rewards": "<f4", "labels": "<f4"}


@dataclass(frozen=True)
class PartSummary:
    """What a part holds: its examples, its answers and labels for each, the bytes of a token id, and the size and the
    checksum of each file."""

    examples: int
    answers: int
    labels: int
    token_bytes: int
    has_prefixes: bool
    files: dict[str, list[Any]]

    def is_intact(self, folder: Path) -> bool:
        """Whether all files of the part in a folder are as they were written; reads them whole."""
        return all(mark_of(folder / name, size) == [size, checksum] for name, (size, checksum) in self.files.items())


class PartWriter(AbstractContextManager):
    """Writes examples, which all have the same number of answers, to the files of a new part."""

    def __init__(self, folder: Path, token_bytes: int) -> None:
        """Makes the folder. `token_bytes` is 2 if no token id and no length is above 65,535, else 4. Raises OSError if
        files cannot be written."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._token_bytes = token_bytes
        self._files = ExitStack()
        self._writers: dict[str, _CheckedFile] = {}
        self._examples = self._answers = self._labels = 0
        self._has_prefixes = False

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, example: Example) -> None:
        """Writes an example. Raises OSError if it cannot be written."""
        prefixes = [ids for of_answer in example.prefixes or () for ids in of_answer]
        lengths = [np.array(list(map(len, prefixes)), int)] if prefixes else []
        numbers = np.concatenate([example.prompt, *example.answers, *lengths, *prefixes])
        self._write("tokens", numbers.astype(f"<u{self._token_bytes}"))
        counts = [len(numbers), len(example.prompt), *map(len, example.answers), *example.prefix_counts]
        self._write("lengths", np.array(counts, "<i4"))
        if example.rewards is not None:
            self._write("rewards", np.array(example.rewards, "<f4"))
        if example.labels is not None:
            self._write("labels", np.array(example.labels, "<f4"))
        self._examples += 1
        self._answers, self._labels = len(example.answers), len(example.labels or ())
        self._has_prefixes = example.prefixes is not None

    def finish(self) -> PartSummary:
        """Makes sure that all is on the disk."""
        files = {name: writer.finish() for name, writer in self._writers.items()}
        return PartSummary(self._examples, self._answers, self._labels, self._token_bytes, self._has_prefixes, files)

    def _write(self, name: str, numbers: np.ndarray) -> None:
        if name not in self._writers:
            self._writers[name] = self._files.enter_context(_CheckedFile(self._folder / name))
        self._writers[name].write(numbers.tobytes())


class StoredExamples(Sequence[Example]):
    """The examples of one or more parts, in order. What is read of them is only what is asked for.

    Attributes:
        lengths: of all examples; about 16 bytes for each pair.
        digest: as `digest_of` these examples, if it was given.
    """

    def __init__(self, parts: Sequence[tuple[Path, PartSummary]], digest: str = "") -> None:
        """Maps the files of all parts that have examples; they must be intact."""
        self._parts = [_Part(folder, summary) for folder, summary in parts if summary.examples]
        self._ends = np.cumsum([len(part.lengths) for part in self._parts])
        self.digest = digest

    @cached_property
    def lengths(self) -> Lengths:
        numbers = np.concatenate([part.lengths for part in self._parts])
        answers = (numbers.shape[1] - 2) // 2
        return Lengths(numbers[:, 1], numbers[:, 2 : 2 + answers], numbers[:, 2 + answers :])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part.example(int(index - self._ends[number] + len(part.lengths)))

    def __iter__(self) -> Iterator[Example]:
        for part in self._parts:
            yield from map(part.example, range(len(part.lengths)))


class _Part:
    """The mapped files of a part."""

    def __init__(self, folder: Path, summary: PartSummary) -> None:
        def mapped(name: str, dtype: str, columns: int) -> np.ndarray | None:
            if name not in summary.files:
                return None
            return np.memmap(folder / name, dtype, mode="r").view(np.ndarray).reshape(-1, columns)

        self._summary = summary
        self._tokens = mapped("tokens", f"<u{summary.token_bytes}", 1)[:, 0]
        self.lengths = mapped("lengths", _DTYPES["lengths"], 2 + 2 * summary.answers)
        self._rewards = mapped("rewards", _DTYPES["rewards"], summary.answers)
        self._labels = mapped("labels", _DTYPES["labels"], summary.labels)
        self._ends = np.cumsum(self.lengths[:, 0], dtype=np.int64)

    def example(self, index: int) -> Example:
        count, *lengths = self.lengths[index].tolist()
        end = int(self._ends[index])
        numbers = self._tokens[end - count : end].astype(np.int32)
        answers = self._summary.answers
        prompt, *texts, rest = _cut(numbers, lengths[: 1 + answers])
        prefixes = None
        if self._summary.has_prefixes:
            counts = lengths[1 + answers :]
            every = sum(counts)
            of_all = _cut(rest[every:], rest[:every].tolist())
            starts = np.cumsum([0, *counts])
            prefixes = tuple(tuple(of_all[start : start + count]) for start, count in zip(starts, counts, strict=False))
        rewards, labels = (
            None if numbers is None else tuple(numbers[index].tolist()) for numbers in (self._rewards, self._labels)
        )
        return Example(prompt, tuple(texts), prefixes, rewards, labels)


def _cut(numbers: Int[np.ndarray, "N"], lengths: Sequence[int]) -> list[Int[np.ndarray, "M"]]:
    """Pieces of these lengths, and the rest."""
    ends = list(itertools.accumulate(lengths))
    return [numbers[start:end] for start, end in zip([0, *ends], [*ends, len(numbers)], strict=True)]


class _CheckedFile(AbstractContextManager):
    """A file that is written from its beginning to its end, with a checksum of its content."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=_BLOCK)
        self._checksum = xxhash.xxh3_128()
        self._size = 0

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._checksum.update(content)
        self._size += len(content)

    def finish(self) -> list[Any]:
        flush_to_disk(self._file)
        return [self._size, self._checksum.hexdigest()]


def mark_of(path: Path, size: int | None = None) -> list[Any] | None:
    """The size and the checksum of a file; None if it is not there, or does not have this size."""
    checksum = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            found = path.stat().st_size
            if size not in (None, found):
                return None
            while block := file.read(_BLOCK):
                checksum.update(block)
    except OSError:
        return None
    return [found, checksum.hexdigest()]
