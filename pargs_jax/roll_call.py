"""Waits until all processes of a run are there, and says which are not.

JAX waits too, but ends a process with a stack trace that does not say who is missing. So processes with known addresses
first report to the first one over TCP, at the address where JAX's coordinator will listen afterwards. The connections
stay open: `pargs_jax.lost_processes` tells by them when a process is gone.
"""

import contextlib
import os
import re
import socket
import time

from pargs_jax.errors import InputError

_HELLO = re.compile(rb"process (\d{1,9}) of (\d{1,9})\n")
_START = b"start\n"
_RETRY_SECONDS = 0.2
_READ_SECONDS = 5.0  # for one short line of a process that is there


def call_roll(address: str, count: int, index: int, timeout: float) -> dict[int, socket.socket]:
    """Returns when all processes of a run have called this: the first process's connections to all others, by their
    numbers; another one's to the first.

    Args:
        address: HOST:PORT, where the first process can be reached.
        count: the number of processes.
        index: the number of this process, from 0.
        timeout: the most seconds to wait.

    Raises InputError in all processes that came if some did not, and names these; also if the host is unknown or the
    port is taken.
    """
    host, _, port = address.rpartition(":")
    connections, missing = (
        _wait_for_others(int(port), count, timeout)
        if index == 0
        else _report_to_first(host.strip("[]"), int(port), count, index, timeout)
    )
    if missing:
        raise InputError(
            f"processes: of {count}, number {', '.join(map(str, missing))} did not come to {address} within "
            f"{timeout:g} seconds"
        )
    return connections


def _wait_for_others(port: int, count: int, timeout: float) -> tuple[dict[int, socket.socket], list[int]]:
    """The connections to all others, and the numbers of those that did not come; connections only if all came."""
    deadline = time.monotonic() + timeout
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        reason = os.strerror(error.errno)
        raise InputError(f"processes.coordinator: cannot listen at port {port} ({reason})") from error
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        while len(here) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                stack.enter_context(connection)
                if (number := _number_said(connection, count)) is not None:
                    here[number] = connection  # of a process that was started again, the newest
        missing = sorted(set(range(1, count)) - here.keys())
        answer = f"missing {' '.join(map(str, missing))}\n".encode() if missing else _START
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(answer)
        if missing:
            return {}, missing
        # Others may have come and gone meanwhile, or were no processes of this run; these stay open.
        kept = {number: connection.dup() for number, connection in here.items()}
    return kept, []


def _number_said(connection: socket.socket, count: int) -> int | None:
    """The number of the process at the other end; None if it is not one of this run's."""
    connection.settimeout(_READ_SECONDS)
    said = _HELLO.fullmatch(_line(connection))
    if said is None:
        return None
    number, other_count = map(int, said.groups())
    if other_count != count:
        raise InputError(f"processes.count: got {count} in the first process, but {other_count} in number {number}")
    return number


def _report_to_first(
    host: str, port: int, count: int, index: int, timeout: float
) -> tuple[dict[int, socket.socket], list[int]]:
    """The connection to the first process, and the numbers of those that did not come, as it says."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise InputError(f"processes.coordinator: the host {host} is not known ({error.strerror})") from error
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(socket.create_connection((host, port), timeout=left))
                connection.sendall(f"process {index} of {count}\n".encode())
                connection.settimeout(left + _READ_SECONDS)  # the first one began to wait later
                answer = _line(connection)
            except OSError:
                answer = b""
            if answer == _START:
                return {0: connection.dup()}, []
            if answer.startswith(b"missing "):
                return {}, [int(number) for number in answer.split()[1:]]
        time.sleep(_RETRY_SECONDS)
    return {}, [0]


def _line(connection: socket.socket) -> bytes:
    """What comes up to the end of a short line; less if it ends, or does not come in time."""
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < 4096 and (more := connection.recv(1024)):
            said += more
    return said
