"""The processes of a run find each other, or say which are missing."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pargs_jax.errors import InputError
from pargs_jax.roll_call import call_roll

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def results(port, count, indices, timeout, host="localhost"):
    """What each process of those that come gets: None, or the message of its error."""

    def one(index):
        try:
            for connection in call_roll(f"{host}:{port}", count, index, timeout).values():
                connection.close()
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(one, indices))


def test_all_that_come_go_on(port):
    began = time.monotonic()
    assert results(port, 3, (2, 0, 1), timeout=30) == [None, None, None]
    assert time.monotonic() - began < 10
    assert (
        results(port, 2, (0, 1), timeout=30, host="[::1]" if socket.has_dualstack_ipv6() else "127.0.0.1") == [None] * 2
    )


def test_those_that_never_come_are_named_by_all_others(port):
    message = f"processes: of 4, number 1, 3 did not come to localhost:{port} within 1 seconds"
    assert results(port, 4, (0, 2), timeout=1) == [message, message]
    assert results(port, 2, (1,), timeout=0.5) == [
        f"processes: of 2, number 0 did not come to localhost:{port} within 0.5 seconds"
    ]


def test_what_is_not_a_process_of_the_run_is_ignored_or_refused(port):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(results, port, 2, (0,), 30)
        while True:
            try:
                with socket.create_connection(("localhost", port), timeout=1) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        assert results(port, 2, (1,), timeout=30) == [None]
        assert first.result() == [None]
    with socket.create_server(("", port)):
        assert results(port, 2, (0,), timeout=1) == [
            f"processes.coordinator: cannot listen at port {port} (Address already in use)"
        ]
    (message,) = results(port, 2, (1,), timeout=1, host="no-such-host.invalid")
    assert message.startswith("processes.coordinator: the host no-such-host.invalid is not known (")
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(results, port, 3, (1,), 1)
        assert results(port, 2, (0,), timeout=10) == ["processes.count: got 2 in the first process, but 3 in number 1"]
        assert "number 0 did not come" in other.result()[0]


START = (
    "from pargs_jax import processes; from pargs_jax.commands.process import run_as_command\n"
    "from pargs_jax.processes_config import ProcessesConfig; import jax, sys; processes.TIMEOUT = int(sys.argv[1])\n"
    "given = (sys.argv[2], *map(int, sys.argv[3:])) if sys.argv[2:] else ()\n"
    "run_as_command(lambda: processes.start_processes(ProcessesConfig(*given)))\n"
    "print(jax.process_index(), jax.process_count(), flush=True); sys.stdin.read()"
)


def start(*words, **variables):
    """A process that says its number and how many there are, and ends when its stdin is closed."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", START, *map(str, words)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_by_slurm(seconds, job, indices):
    """Tasks of a job of two, as `srun` starts them; the first listens at port 61440 + job."""
    of_job = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [start(seconds, **of_job, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in indices]


def test_processes_start_by_address_and_under_slurm(port):
    job = port % 4096
    by_address = [start(60, f"localhost:{port}", 2, index) for index in (0, 1)]
    by_slurm = start_by_slurm(60, job, (0, 1))
    alone = start(2, f"localhost:{port + 1}", 2, 0)
    (alone_by_slurm,) = start_by_slurm(2, (job + 1) % 4096, (0,))
    for running in (by_address, by_slurm):
        assert [process.stdout.readline() for process in running] == ["0 2\n", "1 2\n"]
    for process in by_address:
        process.stdin.close()
    assert [process.wait(60) for process in by_address] == [0, 0]
    by_slurm[1].kill()
    assert (by_slurm[0].wait(20), by_slurm[0].stderr.read()) == (2, gone(1, of=2))
    for process, where in ((alone, f"{port + 1}"), (alone_by_slurm, f"{61440 + (job + 1) % 4096}")):
        message = f"error: processes: of 2, number 1 did not come to localhost:{where} within 2 seconds\n"
        assert (process.wait(100), process.stderr.read()) == (2, message)


def gone(number, of):
    return (
        f"error: processes: of {of}, number {number} is gone; it was killed, or its machine was lost. What was saved "
        "is whole: start all of them again, a training run with the option resume\n"
    )


WATCHED = """
import sys, time
from pargs_jax import lost_processes
from pargs_jax.commands.process import run_as_command
from pargs_jax.errors import InputError
from pargs_jax.roll_call import call_roll

lost_processes._GRACE = 0.2
address, count, index = sys.argv[1], *map(int, sys.argv[2:])

def main():
    lost_processes.watch_processes(call_roll(address, count, index, 30), count)
    print("here", flush=True)
    match input():
        case "fail":
            raise InputError("disk full")
        case "wait":
            time.sleep(60)

run_as_command(main)
"""


@pytest.fixture
def watched(port):
    """Starts three processes that watch each other, and does with each what its word says; returns how each ended."""
    running = []

    def run(*words):
        running[:] = [
            subprocess.Popen(
                [sys.executable, "-c", WATCHED, f"localhost:{port}", "3", str(index)],
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in range(3)
        ]  # fmt: skip
        for process in running:
            assert process.stdout.readline() == "here\n"
        for process, word in sorted(zip(running, words, strict=True), key=lambda each: each[1] != "end"):
            if word == "kill":
                process.kill()
            else:
                process.stdin.write(f"{word}\n")
                process.stdin.flush()
        return [(process.wait(20), process.stderr.read()) for process in running]

    yield run
    for process in running:
        process.kill()


@pytest.mark.parametrize("lost", [0, 2])
def test_when_a_process_is_killed_the_others_end_and_name_it(watched, lost):
    words = ["wait"] * 3
    words[lost] = "kill"
    ended = watched(*words)
    assert ended.pop(lost) == (-9, "")
    assert ended == [(2, gone(lost, of=3))] * 2


def test_when_a_process_ends_with_an_error_the_others_end_and_name_it(watched):
    ended = watched("wait", "fail", "wait")
    assert ended.pop(1) == (2, "error: disk full\n")
    assert {code for code, _ in ended} == {2}
    assert all("of 3, number 1 ended with an error, which it printed." in said for _, said in ended)


def test_a_process_that_is_done_ends_no_other(watched):
    assert watched("end", "end", "end") == [(0, "")] * 3
