"""How a command's process runs and ends: errors and warnings as lines, exit codes, Ctrl-C and SIGTERM.

Front doors import this before anything that takes long to import, so that signals are answered from the start.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pargs_jax.errors import InputError, InputWarning, Terminated
from pargs_jax.signals import signals_end_process


def run_as_command(main: Callable[[], None]) -> None:
    """Runs `main` as a command: bad input is one line on stderr and exit code 2, Ctrl-C is exit code 130 and
    SIGTERM 143 (`pargs_jax.signals`).

    A reader that closes our output early (`decode.py | head`) ends the command quietly, with the shell's code 141.
    """
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # such as that PyTorch is missing, which nothing here needs
    with signals_end_process():
        try:
            with _warnings_as_lines():
                main()
            sys.stdout.flush()
        except InputError as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            sys.exit(2)
        except Terminated:
            print("terminated", file=sys.stderr)
            sys.exit(143)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            # Python flushes stdout once more at exit, which would raise again: point it to where writing works.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Prints an `InputWarning` as one line on stderr, where Python would show the source line too."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        show = warnings.showwarning

        def show_as_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, InputWarning):
                print("warning:", " ".join(str(message).splitlines()), file=sys.stderr)
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_as_line
        yield
