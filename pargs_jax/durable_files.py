"""Files that a kill, a full disk or a second process cannot spoil."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pargs_jax.errors import InputError

# How safetensors and tensorstore, which raise no OSError, spell the number of one.
_FOREIGN_OS_ERROR = re.compile(r"os[_ ]error\D*(\d+)")


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file in one step: whoever reads it, also after a kill, finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def append_all(file: IO[bytes], text: str) -> None:
    """Appends to a file opened without a buffer. Raises OSError where a disk takes only a part of it; nothing is left
    in a buffer that would be written later."""
    left = memoryview(text.encode())
    while left:
        left = left[file.write(left) :]


def hold(file: IO[bytes], busy: str) -> None:
    """Locks an open file for as long as it stays open; the kernel unlocks it when the process ends, however it ends.

    Raises InputError, with the message `busy`, if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(busy) from None
    except OSError as error:
        # Some network file systems have no locks: better an unguarded run than none.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def write_failure(error: BaseException) -> str | None:
    """The operating system's reason for a write that failed, such as `No space left on device`; None where the error
    is of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _FOREIGN_OS_ERROR.search(str(error))):
        number = int(found[1])
    return None if number is None else os.strerror(number)


@contextmanager
def write_failures_named(place: Path, advice: str) -> Iterator[None]:
    """Turns a failed write inside into one InputError that says where, why, and `advice`."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise InputError(f"{place}: cannot be written ({reason}); {advice}") from error
