"""Ends the processes of a run when one of them is gone, with one line that names it.

JAX notices a lost process by missing heartbeats, after more than a minute, and ends the others with a stack trace that
does not say who is missing. A closed connection tells it at once. The first process has a connection to each of the
others, and tells them what it sees.
"""

import atexit
import contextlib
import os
import selectors
import socket
import sys
import threading
import time

_DONE, _FAILED, _GONE = "done", "failed", "gone"
_GRACE = 10.0
"""Seconds that a process has to end by itself when another one ended with an error: often all find the same error."""
_NOTICE = 1.0
"""Seconds after an error in which this process may learn that another one is gone, which is what caused it."""
_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A machine that is lost closes no connection; probes find that out within 30 seconds."""

_watch: "_Watch | None" = None


def watch_processes(connections: dict[int, socket.socket], count: int) -> None:
    """Ends this process with exit code 2, from another thread, as soon as another process of the run is gone: at once
    if it was killed, within 30 seconds if its machine was lost, and 10 seconds after it ended with an error.

    Args:
        connections: those that `call_roll` returns.
        count: the number of processes.
    """
    global _watch
    _watch = _Watch(connections, count)
    atexit.register(_watch.tell, _DONE)
    threading.Thread(target=_watch.run, name="lost processes", daemon=True).start()


def tell_failure() -> None:
    """Tells the other processes, if there are any, that this one ends with an error. If another one is gone, which
    breaks what they compute together, this ends the process instead, with the line that names it."""
    if _watch is not None:
        time.sleep(_NOTICE)
        _watch.tell(_FAILED)


class _Watch:
    """Messages are lines: what happened, and to which process."""

    def __init__(self, connections: dict[int, socket.socket], count: int) -> None:
        self._connections, self._count = connections, count
        self._is_first = 0 not in connections
        self._has_told = False
        for connection in connections.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _PROBES.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def tell(self, what: str) -> None:
        """Tells the processes that this one is connected to how it ends; the first word counts."""
        if not self._has_told:
            self._has_told = True
            self._send(f"{what}\n")

    def run(self) -> None:
        """Reads until all that this process is connected to are done."""
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    said = b""
                    with contextlib.suppress(OSError):
                        said = key.fileobj.recv(1024)
                    words = said.decode(errors="replace").split() or [_GONE]
                    if words[0] != _DONE:
                        # The first process says who it was; what others say is about themselves.
                        self._end(words[0], int(words[1]) if len(words) > 1 else key.data)
                    selector.unregister(key.fileobj)

    def _end(self, what: str, number: int) -> None:
        if self._is_first:
            self._send(f"{what} {number}\n", but=number)
        if what == _FAILED:
            time.sleep(_GRACE)
            how = "ended with an error, which it printed"
        else:
            how = "is gone; it was killed, or its machine was lost"
        line = (
            f"error: processes: of {self._count}, number {number} {how}. What was saved is whole: "
            "start all of them again, a training run with the option resume\n"
        )
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), line.encode())
        os._exit(2)

    def _send(self, line: str, but: int | None = None) -> None:
        for number, connection in self._connections.items():
            if number != but:
                with contextlib.suppress(OSError):
                    connection.sendall(line.encode())
