"""The exception for a user's mistake, the warning of a possible one, and the exception that ends a run on request."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: a config, a file, a row or a shape that cannot be used.

    The message is one line that says what is wrong, where, and what would be right. The commands print it and exit with
    code 2; library callers may catch it as a `ValueError`.
    """

    def __init__(self, message: str) -> None:
        """Breaks of lines, which a name or a value in the message may have, become spaces."""
        super().__init__(" ".join(filter(None, message.splitlines())))


class InputWarning(UserWarning):
    """Input that is used but may be a mistake. The message is one line, and the commands print it."""


def warn(message: str) -> None:
    """Issues an `InputWarning`, attributed to the caller's caller."""
    warnings.warn(message, InputWarning, stacklevel=3)


class Terminated(KeyboardInterrupt):
    """Raised after SIGTERM, once the run's state is saved. Like Ctrl-C, it is not an error to recover from."""


@contextmanager
def input_errors_named_after(place: object) -> Iterator[None]:
    """Prefixes an InputError with the file or the place that it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def first_line(error: Exception) -> str:
    """The message of another library's error, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
