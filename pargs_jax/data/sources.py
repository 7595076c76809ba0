"""Reads a local file or a hub data set as rows of named columns, under the names that the package uses.

JSONL, CSV and Parquet files are read as a stream, a small part at a time.
"""

import csv
import gzip
import hashlib
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


_SAMPLE, _SAMPLES = 2**16, 64
"""Bytes of a sample of a file's content, and how many are taken."""
_BLOCK = 2**20
_PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at once, besides what the file keeps together."""


class SourceRow(NamedTuple):
    """A row's position in its source, its content, and the problem that was found while reading it, if any."""

    line: int
    content: Any
    problem: str = ""


class Share(NamedTuple):
    """One of `count` shares of a source's rows, by its number from 0. All shares, one after the other, are the source:
    JSONL files are divided by bytes, Parquet files and data sets by rows. The first share of other files is the whole.
    """

    number: int = 0
    count: int = 1

    def of(self, total: int) -> range:
        """This share of so many bytes or rows."""
        return range(total * self.number // self.count, total * (self.number + 1) // self.count)


WHOLE = Share()


@dataclass
class Census:
    """Which columns and which splits the rows of a source have; a sum is that of several shares.

    Attributes:
        columns: names of columns.
        splits: how often each value of the column `split` occurs; None stands for rows without one.
        other_splits: how many rows were left out because they belong to another split.
    """

    columns: set[str] = field(default_factory=set)
    splits: Counter[str | None] = field(default_factory=Counter)
    other_splits: int = 0

    def __add__(self, other: "Census") -> "Census":
        return Census(self.columns | other.columns, self.splits + other.splits, self.other_splits + other.other_splits)


@dataclass
class Rows:
    """The rows of a local file or of a hub data set (or a local folder laid out like one), to be read once.

    Attributes:
        source: the file, folder or hub id.
        split: `train` or `eval`. Of a file with a column `split`, only rows of this split are given; None gives every
            row. On the hub, `eval` joins all splits of the data set that `SPLITS` lists for it; any other value is the
            name of a split.
        columns: the source's names for columns that it names differently.
        share: which of the rows are read. Only if they are all, the census is checked at the end.
        census: what was found so far.
    """

    source: str | Path
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    share: Share = WHOLE
    census: Census = field(default_factory=Census)

    def __iter__(self) -> Iterator[SourceRow]:
        """Yields the rows.

        Raises InputError if the source is missing, unreadable or empty, if no row has a column that `columns` names, or
        if the source's splits are unknown or do not include `split`.
        """
        for row in self._read():
            if isinstance(row.content, dict):
                self.census.columns.update(map(str, row.content))
                row = row._replace(content=self._renamed(row.content))
                if not self._belongs(row):
                    self.census.other_splits += 1
                    continue
            yield row
        if self.share == WHOLE:
            self.check(self.census)

    def check(self, census: Census) -> None:
        """Raises InputError if the columns or the splits of the whole source are not those that are asked for."""
        names, splits = census.columns, census.splits
        missing = [column for column in self.columns.values() if column not in names]
        if names and missing:
            raise InputError(
                f"{self.source}: no row has a column {missing[0]!r}; the columns are {', '.join(sorted(names))}"
            )
        if None in splits and len(splits) > 1:
            raise InputError(
                f"{self.source}: {splits[None]} rows have no split, but others do; fill or drop the column split"
            )
        if census.other_splits and census.other_splits == splits.total():
            raise InputError(
                f"{self.source}: no row's split is {_listed(SPLITS[self.split])}; the column split has "
                f"{', '.join(map(repr, splits))}"
            )

    def fingerprint(self) -> str:
        """A digest that differs when the source does. Of a file, it covers its path, size and time, and samples of its
        content: all of it up to 4 MiB, 64 places in larger ones. Raises InputError for a source that is not there."""
        path = Path(self.source)
        if self._file_reader() is None:
            return _hub_dataset(str(self.source), self.split or "train")._fingerprint
        with _read_errors_named_after(self.source), open(path, "rb") as file:
            status = path.stat()
            found = hashlib.sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode())
            for number in range(_SAMPLES):
                file.seek(max(0, status.st_size - _SAMPLE) * number // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
        return found.hexdigest()

    def _renamed(self, content: dict[Any, Any]) -> dict[Any, Any]:
        renamed = {name: content[column] for name, column in self.columns.items() if column in content}
        taken = {column for column in self.columns.values() if column in content}
        return {name: value for name, value in content.items() if name not in taken} | renamed

    def _belongs(self, row: SourceRow) -> bool:
        """Whether a row belongs to `split`; also counts the values of its column `split`."""
        if self.split not in SPLITS or not Path(self.source).is_file():
            return True
        value = row.content.get("split")
        said = None if value is None or value == "" else str(value)
        self.census.splits[said] += 1
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
        reader = self._file_reader()
        if reader is None:
            yield from _hub_rows(str(self.source), self.split or "train", self.share)
        else:
            with _read_errors_named_after(self.source):
                yield from reader(Path(self.source), self.share)

    def _file_reader(self) -> "Callable[[Path, Share], Iterator[SourceRow]] | None":
        """What reads the source; None for a data set. Raises InputError if it is neither a file nor a data set."""
        path = Path(self.source)
        ending = next((ending for ending in _FILE_READERS if path.name.lower().endswith(ending)), None)
        if path.is_file() and ending is None:
            raise InputError(f"{self.source}: cannot read this kind of file; it must end in {', '.join(_FILE_READERS)}")
        if path.is_file():
            return _FILE_READERS[ending]
        if path.is_dir() or (ending is None and HUB_ID.fullmatch(str(self.source))):
            return None
        raise InputError(f"{self.source}: no such file, and not a hub id such as Anthropic/hh-rlhf")


@contextmanager
def _read_errors_named_after(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source}: cannot be read: {error}") from error


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _jsonl_rows(path: Path, share: Share) -> Iterator[SourceRow]:
    """The lines whose first byte is in the share."""
    with open(path, "rb") as file:
        own = share.of(path.stat().st_size)
        if own.start > 0:
            file.seek(own.start - 1)
            file.readline()
        place = file.tell()
        for line in itertools.count(_lines_before(path, place) + 1):
            # Whoever has the last share also has what was appended meanwhile.
            if (place >= own.stop and share.number + 1 < share.count) or not (raw := file.readline()):
                return
            place += len(raw)
            if raw.strip():
                yield _json_row(line, raw)


def _lines_before(path: Path, place: int) -> int:
    """The number of line breaks in a file's first bytes."""
    count = 0
    with open(path, "rb") as file:
        while place > 0 and (block := file.read(min(place, _BLOCK))):
            count += block.count(b"\n")
            place -= len(block)
    return count


def _gzip_rows(path: Path) -> Iterator[SourceRow]:
    with gzip.open(path) as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield _json_row(line, raw)


def _json_row(line: int, raw: bytes) -> SourceRow:
    try:
        return SourceRow(line, parse_json(raw))
    except InputError as error:
        return SourceRow(line, raw.decode(errors="replace"), f"the line {error}")


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


def _parquet_rows(path: Path, share: Share) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            own = share.of(file.metadata.num_rows)
            first = 0  # row of a group
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < own.stop and first + rows > own.start:
                    yield from _group_rows(file, group, first, own)
                first += rows
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter for dates that Python lacks
        raise InputError(f"{path}: not a Parquet file: {first_line(error)}") from error


def _group_rows(file: Any, group: int, first: int, own: range) -> Iterator[SourceRow]:
    """The rows of a group, which begins with row `first` of the file, that are in the share `own`."""
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group]):
        here = range(max(own.start - first, 0), min(own.stop - first, len(batch)))
        contents = batch.slice(here.start, len(here)).to_pylist() if here else []
        yield from map(SourceRow, itertools.count(first + here.start + 1), contents)
        first += len(batch)


def _hub_rows(source: str, split: str, share: Share) -> Iterator[SourceRow]:
    rows, first = _hub_dataset(source, split), 0
    if share != WHOLE:
        own = share.of(len(rows))
        rows, first = rows.select(own), own.start
    yield from map(SourceRow, itertools.count(first + 1), rows)


def _hub_dataset(source: str, split: str) -> Any:
    import datasets  # slow to import

    try:
        if split == "eval":
            there = datasets.get_dataset_split_names(source)
            split = "+".join(name for name in there if name in SPLITS["eval"]) or split
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises OSError, ValueError and its own errors here
        raise InputError(f"data set {source!r}, split {split!r}: {first_line(error)}") from error


def _undivided(read: Callable[[Path], Iterator[SourceRow]]) -> Callable[[Path, Share], Iterator[SourceRow]]:
    """A reader of files that are not divided: their first share is the whole."""
    return lambda path, share: iter(()) if share.number else read(path)


_FILE_READERS: dict[str, Callable[[Path, Share], Iterator[SourceRow]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _undivided(_gzip_rows),
    ".json": _undivided(_json_rows),
    ".csv": _undivided(_csv_rows),
    ".parquet": _parquet_rows,
    ".txt": _undivided(_text_rows),
}
