"""Keeps freed memory in the process, for programs that allocate the same large arrays at every step on a CPU."""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_NEVER = -1
"""A threshold that no size reaches; the largest number that fits would be 2 GiB."""
_ACCELERATORS = ("nvidia0", "kfd", "accel0", "vfio/0")
"""What is in `/dev` where there is a GPU or a TPU."""


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed for the next allocation. Returns whether it did: only glibc can.

    By default glibc gives large arrays back to the system as soon as they are freed, and the system clears every page
    that it hands out again. A training step of XLA on a CPU allocates all its arrays anew, so a small model spends a
    seventh of its CPU time on that. The price: the process keeps the most memory that it ever needed.

    Call it before JAX starts its threads, because those of glibc's arenas that other threads already have give memory
    back whatever their threshold is. Does nothing where there is an accelerator, since arrays are on that, or if the
    user has set one of glibc's own variables.
    """
    has_accelerator = any(Path("/dev", name).exists() for name in _ACCELERATORS)
    is_set = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if not sys.platform.startswith("linux") or has_accelerator or is_set:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
