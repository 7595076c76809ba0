"""Reads a local file or a hub data set as rows of named columns, under the names that the package uses."""

import csv
import gzip
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pargs_jax.errors import InputError, first_line
from pargs_jax.json_text import parse_json
from pargs_jax.text.tokenizer_files import HUB_ID

SPLITS = {
    "train": ("train", "training"),
    "eval": ("test", "validation", "valid", "val", "eval", "evaluation", "dev", "heldout", "held_out", "held-out"),
}
"""Values of a column `split` for training rows and for evaluation rows."""


class SourceRow(NamedTuple):
    """A row's position in its source, its content, and the problem that was found while reading it, if any."""

    line: int
    content: Any
    problem: str = ""


@dataclass
class Rows:
    """The rows of a local file or of a hub data set (or a local folder laid out like one), to be read once.

    Attributes:
        source: the file, folder or hub id.
        split: `train` or `eval`. Of a file with a column `split`, only rows of this split are given; None gives every
            row. On the hub, `eval` joins all splits of the data set that `SPLITS` lists for it; any other value is the
            name of a split.
        columns: the source's names for columns that it names differently.
        other_splits: how many rows were left out so far because they belong to another split.
    """

    source: str | Path
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    other_splits: int = 0

    def __iter__(self) -> Iterator[SourceRow]:
        """Yields the rows.

        Raises InputError if the source is missing, unreadable or empty, if no row has a column that `columns` names, or
        if the source's splits are unknown or do not include `split`.
        """
        names: set[str] = set()
        splits: Counter[Any] = Counter()
        for row in self._read():
            if isinstance(row.content, dict):
                names.update(map(str, row.content))
                row = row._replace(content=self._renamed(row.content))
                if not self._belongs(row, splits):
                    self.other_splits += 1
                    continue
            yield row
        missing = [column for column in self.columns.values() if column not in names]
        if names and missing:
            raise InputError(
                f"{self.source}: no row has a column {missing[0]!r}; the columns are {', '.join(sorted(names))}"
            )
        if None in splits and len(splits) > 1:
            raise InputError(
                f"{self.source}: {splits[None]} rows have no split, but others do; fill or drop the column split"
            )
        if self.other_splits and self.other_splits == splits.total():
            raise InputError(
                f"{self.source}: no row's split is {_listed(SPLITS[self.split])}; the column split has "
                f"{', '.join(map(repr, splits))}"
            )

    def _renamed(self, content: dict[Any, Any]) -> dict[Any, Any]:
        renamed = {name: content[column] for name, column in self.columns.items() if column in content}
        taken = {column for column in self.columns.values() if column in content}
        return {name: value for name, value in content.items() if name not in taken} | renamed

    def _belongs(self, row: SourceRow, splits: Counter[Any]) -> bool:
        """Whether a row belongs to `split`; also counts the values of its column `split`."""
        if self.split not in SPLITS or not Path(self.source).is_file():
            return True
        value = row.content.get("split")
        said = None if value is None or value == "" else str(value)
        splits[said] += 1
        if said is None:
            return True
        split = next((split for split, names in SPLITS.items() if said.lower() in names), None)
        if split is None:
            raise InputError(
                f"{self.source}: line {row.line}: split is {said!r}, must be {_listed(SPLITS['train'])}, or for "
                f"evaluation {_listed(SPLITS['eval'])}; if the column means something else, rename it"
            )
        return split == self.split

    def _read(self) -> Iterator[SourceRow]:
        path = Path(self.source)
        ending = next((ending for ending in _FILE_READERS if path.name.lower().endswith(ending)), None)
        if path.is_file():
            if ending is None:
                raise InputError(
                    f"{self.source}: cannot read this kind of file; it must end in {', '.join(_FILE_READERS)}"
                )
            try:
                yield from _FILE_READERS[ending](path)
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
                raise InputError(f"{self.source}: cannot be read: {error}") from error
        elif path.is_dir() or (ending is None and HUB_ID.fullmatch(str(self.source))):
            yield from _hub_rows(str(self.source), self.split or "train")
        else:
            raise InputError(f"{self.source}: no such file, and not a hub id such as Anthropic/hh-rlhf")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _jsonl_rows(path: Path) -> Iterator[SourceRow]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield SourceRow(line, parse_json(raw))
            except InputError as error:
                yield SourceRow(line, raw.decode(errors="replace"), f"the line {error}")


def _text_rows(path: Path) -> Iterator[SourceRow]:
    """A prompt in each line."""
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield SourceRow(line, {"prompt": text.rstrip("\n")})


def _json_rows(path: Path) -> Iterator[SourceRow]:
    try:
        content = parse_json(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}; a file with one object per line must end in .jsonl") from error
    if isinstance(content, dict):
        content = content.get("data")
    if not isinstance(content, list):
        raise InputError(f"{path}: must hold a list of rows, or an object with the list under 'data'")
    yield from map(SourceRow, itertools.count(1), content)


def _csv_rows(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(2**31 - 1)  # Python's default, 128 KiB a field, is too small for long dialogues
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, fields in enumerate(csv.DictReader(file), start=1):
            problem = "the row has more values than the header has columns" if None in fields else ""
            yield SourceRow(number, fields, problem)


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter for dates that Python lacks
        raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from error
    yield from map(SourceRow, itertools.count(1), rows)


def _hub_rows(source: str, split: str) -> Iterator[SourceRow]:
    import datasets  # slow to import

    try:
        if split == "eval":
            there = datasets.get_dataset_split_names(source)
            split = "+".join(name for name in there if name in SPLITS["eval"]) or split
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises OSError, ValueError and its own errors here
        raise InputError(f"data set {source!r}, split {split!r}: {first_line(error)}") from error
    yield from map(SourceRow, itertools.count(1), rows)


_FILE_READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}
