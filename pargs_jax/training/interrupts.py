"""Ctrl-C and SIGTERM that wait for the running step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from pargs_jax.errors import Terminated
from pargs_jax.processes import largest

_ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class StopRequest:
    """Whether the process was asked to end.

    Attributes:
        error: what to raise at the end of the step: KeyboardInterrupt for Ctrl-C, Terminated for SIGTERM; None while
            nobody asked.
        at_once: whether a second signal came, which interrupts the step: its input is donated, so that there is no
            state left to save.
    """

    def __init__(self) -> None:
        self.error: type[KeyboardInterrupt] | None = None
        self.at_once = False

    def agreed(self, now: bool) -> type[KeyboardInterrupt] | None:
        """What to raise after this step, if anything.

        If one of several processes was asked to end, all do, after the same step: the next after which they all call
        with `now`.
        """
        if jax.process_count() == 1:
            return self.error
        if now:
            kinds = (None, *_ERRORS.values())
            self.error = kinds[largest(kinds.index(self.error))]
        return self.error if now else None

    def note(self, number: int, _: Any) -> None:
        """The signal handler."""
        self.at_once = self.error is not None
        self.error = _ERRORS[signal.Signals(number)]
        if self.at_once:
            raise self.error


@contextmanager
def signals_wait() -> Iterator[StopRequest]:
    """Collects Ctrl-C and SIGTERM, so that a running step ends first. Only the main thread gets signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.note) for number in _ERRORS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
