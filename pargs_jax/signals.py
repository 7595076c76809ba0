"""Ctrl-C and SIGTERM, answered at once by a thread of their own.

Python raises KeyboardInterrupt in whatever Python code the main thread runs next. While XLA compiles that is no code at
all; in a callback of XLA's the exception is lost, or crashes the process. So the commands raise nothing: Python's
handler in C writes the signal's number to a pipe, whatever the main thread does, and a thread that reads the pipe ends
the process. Where the result of a running step has to be saved first, it takes note instead, and the second signal ends
the process.
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
"""The signals that ask a process to end, and what is raised for one once everything is saved."""

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_AGAIN = {signal.SIGINT: "press Ctrl-C again", signal.SIGTERM: "send SIGTERM again"}
_SHOW_CURSOR = b"\x1b[?25h"
_PATIENCE = 1.0  # seconds that a blocked output may hold up the end


class StopRequest:
    """Whether the process was asked to end.

    Attributes:
        number: the signal that asked; None while none did.
        at_once: whether KeyboardInterrupt was raised because a second signal came, and so in the middle of anything.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at_once = False


class _Watcher:
    """Acts on the signals of a command: ends the process, or notes the first one in `request` where there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._request: StopRequest | None = None

    def take_note(self, request: StopRequest | None) -> None:
        """From here on the first signal is noted in the request; with None it ends the process.

        After this returns, nothing is noted in a request that was given before.
        """
        with self._lock:
            self._request = request

    def watch(self, pipe: int) -> None:
        """Acts on each signal whose number comes out of the pipe, until a 0 comes."""
        while number := os.read(pipe, 1)[0]:
            if number not in ERRORS:
                continue
            with self._lock:
                request = self._request
                is_first = request is not None and request.number is None
                if is_first:
                    request.number = number
            if is_first:
                _try(lambda number=number: _say(f"stopping after this step; {_AGAIN[number]} to stop at once"))
            else:
                _end_process(number)


_watcher: _Watcher | None = None
"""That of the command that runs in this process, if one does."""


@contextmanager
def signals_end_process() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process while this is entered: one line on standard error, exit code 130 or 143.

    It ends at once, without Python's exit handlers. Inside `signals_wait` the first signal is noted only. A signal that
    is ignored, as by `nohup`, stays ignored. Does nothing in another thread than the main one, which alone may set
    handlers; afterwards the handlers are those from before.
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
    thread.start()  # takes its time; what comes before waits in the pipe
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
        # While Python shuts down, an exception could only be printed: the system's own way to end is better then.
        atexit.unregister(_end_as_the_system_does)
        atexit.register(_end_as_the_system_does)


@contextmanager
def signals_wait() -> Iterator[StopRequest]:
    """Notes the first Ctrl-C or SIGTERM in a request, so that whoever entered this can end when it is time to.

    In a command the signal is acknowledged with a line, and a second one ends the process. Elsewhere a second one
    raises KeyboardInterrupt; only the main thread gets signals there. The request may still be noted at the very end:
    look at it once more afterwards.
    """
    request = StopRequest()
    if _watcher is not None:
        watcher = _watcher
        watcher.take_note(request)
        try:
            yield request
        finally:
            watcher.take_note(None)
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
    """Sets the handler of all signals that are not ignored, and returns those from before."""
    before = {number: signal.getsignal(number) for number in ERRORS}
    # None is a handler that was not set by Python, and could not be set again.
    before = {number: known for number, known in before.items() if known not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The handler in Python, without which there is none in C; the thread does what there is to do."""


def _end_as_the_system_does() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end_process(number: int) -> None:
    """Ends the process without another instruction of the main thread, which may hold any lock."""
    try:
        _try(sys.stdout.flush)
        _try(_show_cursor)
        _try(lambda: _say(_WORDS[signal.Signals(number)]))
    finally:
        os._exit(128 + number)


def _try(action: Callable[[], None]) -> None:
    """Tries to write something: nothing that goes wrong counts, and a reader that has stopped reading is not waited
    for."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PATIENCE)


def _show_cursor() -> None:
    """Gives a terminal its cursor back, which a progress bar hides."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stream.isatty():
            os.write(stream.fileno(), _SHOW_CURSOR)


def _say(line: str) -> None:
    """Writes a line to standard error, past Python's buffers; on a terminal, below the ^C and the progress bar."""
    if sys.__stderr__ is not None:  # it is None where it was closed before Python started: 2 may be any file then
        start = "\n" if sys.__stderr__.isatty() else ""
        os.write(sys.__stderr__.fileno(), f"{start}{line}\n".encode())
