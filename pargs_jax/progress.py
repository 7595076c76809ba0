"""Shows a command's progress: a bar on a terminal, and lines in a log, such as that of a batch job."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

SECONDS_BETWEEN_LINES = 30.0
WIDE = 100
"""Columns of a terminal that has space for the time passed, too."""


class ShownProgress:
    """Progress through `total` steps or rows, shown inside a `with` block."""

    def __init__(self, console: Console, name: str, total: int, done: int = 0, *, transient: bool = False) -> None:
        """Starts at `done`. A `transient` bar is removed at the end."""
        # Where there is little space, the bar gives way: nothing of the numbers is cut off.
        elapsed = [TimeElapsedColumn(Column(no_wrap=True))] if console.width >= WIDE else []
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"), *elapsed, TextColumn("left"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
        )  # fmt: skip
        self._has_bar = console.is_terminal or console.is_jupyter
        self._bar = Progress(
            *columns, console=console, transient=transient, disable=not self._has_bar, speed_estimate_period=600
        )
        self._task = self._bar.add_task(name, total=total, completed=done, note="compiling")
        self._console, self._name, self._total, self._first = console, name, total, done
        self._began = time.monotonic()
        self._next_line = self._began

    def __enter__(self) -> "ShownProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int, note: str) -> None:
        """Shows how many are done, with a note beside it."""
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if self._has_bar or (now < self._next_line and done < self._total):
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        passed = now - self._began
        left = passed * (self._total - done) / max(done - self._first, 1)
        elapsed_and_remaining = (str(timedelta(seconds=round(seconds))) for seconds in (passed, left))
        line = (f"{self._name} {done}/{self._total}", note, *elapsed_and_remaining)
        self._console.print("{}  {}  {} left {}".format(*line), highlight=False, soft_wrap=True)
