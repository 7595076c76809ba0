"""A folder of tokenised sets, which later runs read instead of tokenising again.

A set lies in a folder named by its key (`ExampleSet.key`). It is made in a folder of another name, which is renamed
when all is written, so a set that is there is whole. Processes of one run each make a part of it, from their share of
the source. They meet in that folder: whoever waits for another waits for its file. A run that needs a set that another
run is making waits for it.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from pargs_jax.data.example_sets import ExampleSet, Found
from pargs_jax.data.examples import digest_of
from pargs_jax.data.preferences import BadRow
from pargs_jax.data.sources import Share
from pargs_jax.data.stored_examples import PartSummary, PartWriter, StoredExamples, mark_of
from pargs_jax.durable_files import flush_to_disk, hold, write_errors_named_after, write_whole
from pargs_jax.errors import InputError
from pargs_jax.json_text import parse_json

SHARED_WITHIN = 60
"""Seconds after which all processes must see what one of them has written."""
_POLL = 0.05
_SECONDS_BEFORE_NOTICE = 5.0
_CONTENT, _BAD_ROWS = "set.json", "bad_rows.jsonl"
_USE, _BUILD, _FAILED = "use", "build", "failed"


class CachedSet:
    """A set that is in the cache.

    Attributes:
        examples: its examples.
        found: what was found in the source.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what the set is. Raises OSError, ValueError, KeyError or TypeError if it is damaged."""
        read = parse_json((folder / _CONTENT).read_bytes())
        content = read["content"]
        if read["checksum"] != _checksum(content):
            raise ValueError("another checksum")
        self._parts = [(folder / _part(number), PartSummary(**part)) for number, part in enumerate(content["parts"])]
        self.found = Found.from_json(content["found"])
        self.examples = StoredExamples(self._parts, content["digest"])

    @property
    def is_intact(self) -> bool:
        """Whether all files are as they were written; reads them whole."""
        return all(summary.is_intact(folder) for folder, summary in self._parts)

    def copy_bad_rows(self, path: Path) -> None:
        """Writes the bad rows of the source to a file. Raises OSError if it cannot be written."""
        with path.open("wb") as file:
            for folder, _ in self._parts:
                with (folder / _BAD_ROWS).open("rb") as part:
                    shutil.copyfileobj(part, file)


class ExampleCache:
    """The cache in a folder, as one process of a run sees it."""

    def __init__(self, folder: Path, own: Share, say: Callable[[str], None], advice: str) -> None:
        """Makes the folder.

        Args:
            folder: where the sets are, the same for all processes.
            own: the share of every source that this process tokenises; its number is that of the process.
            say: prints a line.
            advice: what to do if the folder cannot be used, for an error message.

        Raises OSError if the folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._own = own
        self._say = say
        self._advice = advice

    def get(self, wanted: ExampleSet, key: str, token: str) -> CachedSet:
        """The set, which is made if it is not there or is damaged.

        Args:
            wanted: the set.
            key: its key, as the first process sees the source.
            token: a text that no other run has, the same in all processes of this one.

        Raises InputError for a source that cannot be used, for a file that cannot be written, and if the processes do
        not share the folder.
        """
        meeting = self._folder / f"{key}.{token}"
        with write_errors_named_after(self._folder, self._advice):
            return self._follow(wanted, key, meeting) if self._own.number else self._lead(wanted, key, meeting)

    def _lead(self, wanted: ExampleSet, key: str, meeting: Path) -> CachedSet:
        meeting.mkdir()
        has_told = True
        try:
            with self._locked(key) as is_locked:
                if (there := self._intact(key)) is not None:
                    has_told = self._tell(meeting, _USE, "")
                    return there
                if is_locked:
                    self._remove_leftovers(key)
                return self._make(wanted, key, meeting)
        except InputError as error:
            has_told = self._tell(meeting, _FAILED, str(error))
            raise
        finally:
            if has_told:
                shutil.rmtree(meeting, ignore_errors=True)

    def _follow(self, wanted: ExampleSet, key: str, meeting: Path) -> CachedSet:
        self._wait(meeting.exists, "its processes do not share it")
        has_made = False
        while meeting.exists():
            for told in filter(Path.exists, (meeting / _FAILED, meeting / _USE)):
                text = told.read_text()
                write_whole(meeting / f"seen-{self._own.number}", "")
                if told.name == _FAILED:
                    raise InputError(text)
                return self._known(key)
            if not has_made and (meeting / _BUILD).exists():
                try:
                    with write_errors_named_after(self._folder, self._advice):
                        made = self._make_part(wanted, meeting)
                except InputError as error:
                    made = {"error": str(error)}
                write_whole(meeting / f"made-{self._own.number}", json.dumps(made))
                has_made = True
            time.sleep(_POLL)
        return self._known(key)

    def _make(self, wanted: ExampleSet, key: str, meeting: Path) -> CachedSet:
        """Makes the set with all processes, and gives it its name."""
        write_whole(meeting / _BUILD, "")
        made = [self._make_part(wanted, meeting)]
        for number in range(1, self._own.count):
            while not (path := meeting / f"made-{number}").exists():
                time.sleep(_POLL)
            made.append(parse_json(path.read_bytes()))
            if "error" in made[-1]:
                raise InputError(made[-1]["error"])
        found = sum((Found.from_json(part["found"]) for part in made), Found())
        wanted.check(found)
        if wanted.key() != key:
            raise InputError(f"{wanted.source}: was changed while it was read; start again")
        parts = [(meeting / _part(number), PartSummary(**part["summary"])) for number, part in enumerate(made)]
        content = {
            "digest": digest_of(StoredExamples(parts)),
            "found": found.to_json(),
            "parts": [asdict(summary) for _, summary in parts],
        }
        write_whole(meeting / _CONTENT, json.dumps({"checksum": _checksum(content), "content": content}))
        place, damaged = self._folder / key, meeting.with_name(f"{meeting.name}.damaged")
        if place.exists():
            place.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        meeting.rename(place)
        return CachedSet(place)

    def _make_part(self, wanted: ExampleSet, meeting: Path) -> dict[str, Any]:
        """Tokenises this process's share. Returns what it found and what it wrote, as JSON holds them."""
        folder = meeting / _part(self._own.number)
        with (
            PartWriter(folder, wanted.token_bytes) as writer,
            # A lone surrogate has no UTF-8 form; the backslash escape in its place is how the JSON spelled it.
            (folder / _BAD_ROWS).open("w", encoding="utf-8", errors="backslashreplace") as bad_rows,
        ):

            def refuse(row: BadRow) -> None:
                bad_rows.write(row.text())

            found = wanted.read(self._own, writer.add, refuse)
            flush_to_disk(bad_rows)
            summary = asdict(writer.finish())
        summary["files"][_BAD_ROWS] = mark_of(folder / _BAD_ROWS)
        return {"found": found.to_json(), "summary": summary}

    def _intact(self, key: str) -> CachedSet | None:
        """The set of this key, if it is there and nothing of it was altered."""
        place = self._folder / key
        if not place.exists():
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            if (found := CachedSet(place)).is_intact:
                return found
        self._say(f"{place}: is damaged; tokenising again")
        return None

    def _known(self, key: str) -> CachedSet:
        """The set that the first process has found intact, or made."""
        place = self._folder / key
        self._wait((place / _CONTENT).exists, f"{key} is not in it")
        return CachedSet(place)

    def _tell(self, meeting: Path, what: str, text: str) -> bool:
        """Tells the other processes, and returns whether all of them have seen it in time."""
        if self._own.count == 1 or not meeting.exists():
            return True
        write_whole(meeting / what, text)
        return _holds_within(
            SHARED_WITHIN, lambda: all((meeting / f"seen-{i}").exists() for i in range(1, self._own.count))
        )

    def _wait(self, condition: Callable[[], bool], problem: str) -> None:
        """Waits for what another process has written. Raises InputError if it does not appear."""
        if not _holds_within(SHARED_WITHIN, condition):
            raise InputError(f"{self._folder}: {problem}; {self._advice}")

    @contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Waits until no other run makes the set. Yields whether it is certain: some file systems have no locks."""
        with (self._folder / f"{key}.lock").open("ab") as file:
            began, has_said = time.monotonic(), False
            while True:
                try:
                    is_locked = hold(file, "")
                    break
                except InputError:
                    if not has_said and time.monotonic() - began > _SECONDS_BEFORE_NOTICE:
                        self._say(f"{self._folder}: waiting for another run that tokenises the same rows")
                        has_said = True
                    time.sleep(_POLL)
            yield is_locked

    def _remove_leftovers(self, key: str) -> None:
        """Removes what killed runs have left: whoever makes the set has the lock."""
        for path in [*self._folder.glob(f"{key}.*/{_BUILD}"), *self._folder.glob(f"{key}.*.damaged/{_CONTENT}")]:
            shutil.rmtree(path.parent, ignore_errors=True)


def _holds_within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _part(number: int) -> str:
    return f"part-{number}"


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
