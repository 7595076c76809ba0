"""The exception that a user's mistake raises, the warning of what may be one, and the end of a run on request."""

import warnings


class InputError(ValueError):
    """Bad input: a config, a file, a row or a shape that cannot be used.

    The message is one line that says what is wrong, where, and what would be right. The commands print it and exit with
    code 2; library callers may catch it as a `ValueError`.
    """


class InputWarning(UserWarning):
    """Input that is used, but may not be what was meant. The message is one line, and the commands print it."""


def warn(message: str) -> None:
    """Issues an `InputWarning`, attributed to the caller's caller."""
    warnings.warn(message, InputWarning, stacklevel=3)


class Terminated(KeyboardInterrupt):
    """SIGTERM told the run to end, and what it had is saved. Like Ctrl-C, it is no error to recover from."""


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
