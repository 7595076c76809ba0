"""Writes files so that a kill, a full disk or a second process cannot damage them."""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pargs_jax.errors import InputError

# How safetensors and tensorstore, which do not raise OSError, spell its error number.
_FOREIGN_OS_ERROR = re.compile(r"os[_ ]error\D*(\d+)")


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file in one step: readers find the old text or the new one, even after a kill. Raises InputError
    for a path that is a folder or a device."""
    _check_regular(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def files_together(folder: Path) -> Iterator[Path]:
    """A new folder for files of `folder`, which move there once all of them are complete. Files there that have other
    names stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    written = sorted(file.name for file in partial.iterdir())
    (partial / "usual").touch()
    mode = (partial / "usual").stat().st_mode
    (partial / "usual").unlink()
    for name in written:  # safetensors lets nobody else read its files; the umask decides about ours
        (partial / name).chmod(mode)
    for name in written:
        os.replace(partial / name, folder / name)
    partial.rmdir()


def _check_regular(path: Path) -> None:
    """Raises InputError for what is there but is not a file: a device such as `/dev/full` has no end, and must not be
    replaced by a file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a {'folder' if path.is_dir() else 'device'}, must be a file")


def append_all(file: IO[bytes], text: str) -> None:
    """Appends to a file opened without a buffer, so that nothing is written later. Raises OSError if the disk takes
    only a part of the text."""
    left = memoryview(text.encode())
    while left:
        left = left[file.write(left) :]


def hold(file: IO[bytes], busy: str) -> None:
    """Locks an open file until it is closed; the kernel unlocks it when the process ends for any reason.

    Raises InputError, with the message `busy`, if another process has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(busy) from None
    except OSError as error:
        # Some network file systems have no locks; running without one is better than not running.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


@contextmanager
def opened_to_append(path: Path, command: str, advice: str) -> Iterator[IO[bytes]]:
    """Opens a file without a buffer, makes its folder if it is missing, and locks it. Closes it again only if the block
    raises an error. Raises InputError, which ends in `advice`, for a file that cannot be written, or that another
    process of `command` is writing."""
    with write_errors_named_after(path, advice):
        _check_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    try:
        hold(file, f"{path}: another {command} is writing it; wait for it to end, or {advice}")
        yield file
    except BaseException:
        file.close()
        raise


def write_error_reason(error: BaseException) -> str | None:
    """The operating system's reason for a failed write, such as `No space left on device`; None for errors of another
    kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _FOREIGN_OS_ERROR.search(str(error))):
        number = int(found[1])
    return None if number is None else os.strerror(number)


@contextmanager
def write_errors_named_after(place: Path, advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns a failed write inside into an InputError that names the place, the reason, and `advice`, which may be asked
    for only then."""
    try:
        yield
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None:
            raise
        words = advice if isinstance(advice, str) else advice()
        raise InputError(f"{place}: cannot be written ({reason}); {words}") from error
