"""Freed memory is kept: the same large arrays again cost no page faults."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, threading
from pargs_jax import freed_memory

freed_memory._ACCELERATORS = ()
done = freed_memory.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
TOUCHED = 2**26  # of 4 KiB pages
LARGE = 5 * 2**30  # twice and a half what fits into the C library's own numbers

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(LARGE)))
        ctypes.memset(memory, 1, TOUCHED)
        libc.free(memory)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def work():
    faults()
    print(done, faults() < 2**14)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("variables", "told"), [({}, "True True"), ({"MALLOC_ARENA_MAX": "2"}, "False False")])
def test_freed_memory_is_kept_unless_the_user_sets_glibcs_own_variables(variables, told):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == told
