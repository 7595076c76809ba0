"""The processes of one run, such as the hosts of a pod: how they start and agree.

With one process, these functions do nothing special. All processes must call each of them, in the same order.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from pargs_jax.errors import InputError, first_line
from pargs_jax.lost_processes import watch_processes
from pargs_jax.processes_config import ProcessesConfig
from pargs_jax.roll_call import call_roll

Result = TypeVar("Result")

TIMEOUT = 300
"""Seconds that the processes of a run wait for each other at the start."""
SECONDS_BEFORE_NOTICE = 10.0
"""Seconds before a waiting process says what it waits for."""


def start_processes(config: ProcessesConfig) -> None:
    """Connects this process with the others, before JAX looks for devices.

    On a TPU pod and under SLURM, JAX finds out where they are; elsewhere the config says it. Raises InputError if their
    addresses are not known, or if some do not come within `TIMEOUT`, which it names. If one of them is gone later, the
    others end (`watch_processes`).
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM and not tell us
    try:
        address, count, index = (
            (config.coordinator, config.count, config.index) if config.coordinator else _found_by_jax()
        )
        with _notice(f"waiting for the other processes at {address}, for at most {TIMEOUT} seconds"):
            connections = call_roll(address, count, index, TIMEOUT)
            jax.distributed.initialize(address, count, index, initialization_timeout=TIMEOUT)
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"distributed: cannot find the other processes ({first_line(error)}); "
            "give processes.coordinator (HOST:PORT), processes.count and processes.index"
        ) from error
    watch_processes(connections, count)


def _found_by_jax() -> tuple[str, int, int]:
    """The address of the first process, the number of processes and the number of this one, as
    `jax.distributed.initialize` finds them. Raises ValueError or RuntimeError if it does not."""
    from jax._src.clusters import ClusterEnv  # not public; there is no other way to know before all are there

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(address, None, None, None, None, TIMEOUT)
    if None in found[:3]:
        raise ValueError("JAX finds no SLURM, MPI, Kubernetes or TPU pod")
    return found[:3]


@contextlib.contextmanager
def _notice(message: str) -> Iterator[None]:
    """Says what this process waits for, if that takes long."""
    reminder = threading.Timer(
        SECONDS_BEFORE_NOTICE, print, args=(message,), kwargs={"file": sys.stderr, "flush": True}
    )
    reminder.daemon = True
    reminder.start()
    try:
        yield
    finally:
        reminder.cancel()


def on_first(action: Callable[[], Result]) -> Result | None:
    """Runs an action in the first process and returns its result; the others wait and return None.

    Raises InputError in every process if the action does.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except InputError as refusal:
            error = refusal
    if from_first(np.asarray(error is not None)):
        raise error or InputError("the first process stopped; see its error message")
    return result


def from_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, in all processes; theirs must have the same shape."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def largest(number: int) -> int:
    """The largest number of all processes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.asarray(number))))


def summed(numbers: np.ndarray) -> np.ndarray:
    """The sum of all processes' arrays, element by element, in their dtype; they must have the same shape."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(numbers)).sum(axis=0, dtype=numbers.dtype)
