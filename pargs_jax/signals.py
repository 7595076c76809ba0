"""Handles Ctrl-C and SIGTERM immediately, in a separate thread.

Python raises KeyboardInterrupt in whatever Python code the main thread runs next. While XLA compiles, no Python code
runs; in an XLA callback the exception is lost, or crashes the process. So the commands raise nothing. Python's C
handler writes the signal's number to a pipe, whatever the main thread does, and a thread that reads the pipe ends the
process. If the result of a running step must be saved first, the thread only records the first signal; the second
signal ends the process.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pargs_jax.errors import Terminated

ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""The signals that ask a process to end, and the exception that each one raises once everything is saved."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_AGAIN = {signal.SIGINT: "press Ctrl-C again", signal.SIGTERM: "send SIGTERM again"}
_SHOW_CURSOR = b"\x1b[?25h"
_OUTPUT_TIMEOUT = 1.0  # the most seconds that blocked output may delay the end


class StopRequest:
    """Whether the process was asked to end.

    Attributes:
        number: the signal that asked; None if none did.
        at_once: whether a second signal raised KeyboardInterrupt, which may have interrupted anything.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False


class _Watcher:
    """Handles the signals of a command: ends the process or, if there is a `request`, records the first signal in
    it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._request: StopRequest | None = None
        self._saying = ""

    def record_in(self, request: StopRequest | None, saying: str = "") -> None:
        """From now on, records the first signal in the request, and prints what happens then; with None, the first
        signal ends the process.

        After this returns, nothing is recorded in an earlier request.
        """
        with self._lock:
            self._request, self._saying = request, saying

    def watch(self, pipe: int) -> None:
        """Handles each signal whose number is read from the pipe, until a 0 is read."""
        while number := os.read(pipe, 1)[0]:
            if number not in ERRORS:
                continue
            with self._lock:
                request = self._request
                is_first = request is not None and request.number is None
                if is_first:
                    request.number = number
            if is_first:
                _try(lambda number=number: _write_line(f"{self._saying}; {_AGAIN[number]} to stop at once"))
            else:
                _end_process(number)


_watcher: _Watcher | None = None
"""The watcher of the command that runs in this process, if any."""


@contextmanager
def signals_end_process() -> Iterator[None]:
    """Inside this block, Ctrl-C and SIGTERM end the process: one line on standard error, exit code 130 or 143.

    The process ends at once, without Python's exit handlers. Inside `signals_wait` the first signal is only recorded. A
    signal that is ignored, for example by `nohup`, stays ignored. Does nothing outside the main thread, because only
    that thread may set handlers. Afterwards the previous handlers are restored.
    """
    global _watcher
    if not _is_main_thread():
        yield
        return
    outer, _watcher = _watcher, _Watcher()
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    handlers = _handle(_do_nothing)
    thread = threading.Thread(target=_watcher.watch, args=(read,), name="signals", daemon=True)
    thread.start()  # starting takes time; earlier signals wait in the pipe
    try:
        yield
    finally:
        _restore(handlers)
        signal.set_wakeup_fd(wakeup)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)
        _watcher = outer
        # While Python shuts down, an exception could only be printed, so the system's default way to end is better.
        atexit.unregister(_end_as_the_system_does)
        atexit.register(_end_as_the_system_does)


@contextmanager
def signals_wait(saying: str = "stopping after this step") -> Iterator[StopRequest]:
    """Records the first Ctrl-C or SIGTERM in a request, so that the caller can stop at a good moment.

    In a command, a line acknowledges the signal by `saying` what happens, and a second signal ends the process. In a
    library call, a second signal raises KeyboardInterrupt; there, only the main thread gets signals. A signal may still
    arrive at the very end, so check the request once more after the block.
    """
    request = StopRequest()
    if _watcher is not None:
        watcher = _watcher
        watcher.record_in(request, saying)
        try:
            yield request
        finally:
            watcher.record_in(None)
    elif _is_main_thread():

        def note(number: int, _: FrameType | None) -> None:
            request.at_once = request.number is not None
            request.number = number
            if request.at_once:
                raise ERRORS[signal.Signals(number)]

        handlers = _handle(note)
        try:
            yield request
        finally:
            _restore(handlers)
    else:
        yield request


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets the handler of all signals that are not ignored, and returns the previous handlers."""
    before = {number: signal.getsignal(number) for number in ERRORS}
    # None means that the handler was not set by Python; it could not be restored.
    before = {number: known for number, known in before.items() if known not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A Python handler; without one, Python installs none in C. The watcher thread does the work."""


def _end_as_the_system_does() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_process(number: int) -> None:
    """Ends the process without running the main thread again, because it may hold any lock."""
    try:
        _try(sys.stdout.flush)
        _try(_show_cursor)
        _try(lambda: _write_line(_WORDS[signal.Signals(number)]))
    finally:
        os._exit(128 + number)


def _try(action: Callable[[], None]) -> None:
    """Tries to write something. Errors are ignored, and a reader that has stopped reading is not waited for."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_OUTPUT_TIMEOUT)


def _show_cursor() -> None:
    """Shows the terminal's cursor again, which a progress bar hides."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stream.isatty():
            os.write(stream.fileno(), _SHOW_CURSOR)


def _write_line(line: str) -> None:
    """Writes a line directly to standard error; on a terminal, below the ^C and the progress bar."""
    if sys.__stderr__ is not None:  # None if it was closed before Python started; descriptor 2 may then be any file
        start = "\n" if sys.__stderr__.isatty() else ""
        os.write(sys.__stderr__.fileno(), f"{start}{line}\n".encode())
