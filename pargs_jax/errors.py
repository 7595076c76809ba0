"""The exception that a user's mistake raises, and the one of a run that was told to end."""


class InputError(ValueError):
    """Bad input: a config, a file, a row or a shape that cannot be used.

    The message is one line that says what is wrong, where, and what would be right. The commands print it and exit with
    code 2; library callers may catch it as a `ValueError`.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM told the run to end, and what it had is saved. Like Ctrl-C, it is no error to recover from."""


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
