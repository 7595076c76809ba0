"""How a command's process runs and ends: errors and warnings as lines, exit codes, Ctrl-C and SIGTERM.

Front doors import this before anything that takes long to import, so that signals are answered from the start.
"""

import contextlib
import io
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pargs_jax.errors import InputError, InputWarning, Terminated, first_line
from pargs_jax.lost_processes import tell_failure
from pargs_jax.signals import signals_end_process

DEBUG = "--debug"
"""The word of every command line that shows the stack of an error."""
LONGEST_LINE = 1000
"""The most characters of an error or a warning that are printed; the middle of a longer one is left out."""


def run_as_command(main: Callable[[], None], memory_advice: str = "give it less to do at once") -> None:
    """Runs `main` as a command. Whatever goes wrong is one line on stderr and exit code 2; Ctrl-C is exit code 130 and
    SIGTERM 143 (`pargs_jax.signals`).

    The stack of an error that nobody foresaw is saved in a file, which the line names; with `DEBUG` among the words of
    the command line, every error's stack is printed instead. A reader that closes our output early
    (`decode.py | head`) ends the command quietly, with the shell's code 141.

    Args:
        main: what the command does.
        memory_advice: what needs less memory, for the line that says that there is not enough.
    """
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # such as that PyTorch is missing, which nothing here needs
    shows_stack = DEBUG in sys.argv
    sys.argv = [word for word in sys.argv if word != DEBUG]
    _prepare_output()
    with signals_end_process():
        try:
            with _warnings_as_lines():
                main()
            sys.stdout.flush()
        except Terminated:
            _print_line("terminated")
            sys.exit(143)
        except KeyboardInterrupt:
            _print_line("interrupted")
            sys.exit(130)
        except BrokenPipeError:
            tell_failure()
            _discard_output()
            sys.exit(141)
        except Exception as error:
            tell_failure()
            if shows_stack:
                traceback.print_exception(error)
            else:
                # What half-made objects say while they are deleted is nothing new.
                sys.unraisablehook = lambda _: None
                warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
            _print_line("error", reason_of(error, memory_advice) or _unforeseen(error, not shows_stack))
            try:
                sys.stdout.flush()
            except OSError:
                _discard_output()
            sys.exit(2)


def reason_of(error: Exception, memory_advice: str = "") -> str | None:
    """An error in words that a user can act on; None for a defect of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return f"out of memory; {memory_advice}"
    if isinstance(error, OSError):  # such as a folder that may not be read, or a name that is too long
        reason = error.strerror or first_line(error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    return None


def _unforeseen(error: Exception, saves_stack: bool) -> str:
    line = f"unexpected {type(error).__name__} ({first_line(error)})"
    if not saves_stack:
        return line
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(prefix="pargs_jax-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
        line += f"; the stack is in {path}"
    return line


def _prepare_output() -> None:
    """Makes sure that files which are opened later are not taken for a closed standard output, and that texts which an
    output cannot spell are escaped instead of ending the command."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass  # it took the place of a closed one
        os.close(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Python flushes stdout once more at exit, which would fail again: points it to where writing works."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_line(kind: str, text: str = "") -> None:
    """Prints one line on stderr, without control characters and cut if it is long, with a single write."""
    line = " ".join(filter(None, [f"{kind}:" if text else kind, *text.splitlines()]))
    if len(line) > LONGEST_LINE:
        line = f"{line[: 2 * LONGEST_LINE // 3]} ... {line[-LONGEST_LINE // 3 :]}"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints an `InputWarning` as one line on stderr, where Python would show the source line too."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        show = warnings.showwarning

        def show_as_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, InputWarning):
                _print_line("warning", str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_as_line
        yield
