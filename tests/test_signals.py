"""Ctrl-C and SIGTERM end the commands at once, wherever they are, and only what has to be saved is waited for."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pargs_jax.commands.process import run_as_command
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import save_model
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).parents[1]
WORDS = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n"}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
QUICKLY = 10  # seconds, for a machine that is busy; it takes some hundredths
BEGINNING = """
import ctypes, hashlib, os, signal, sys, time
from pargs_jax.commands.process import run_as_command
from pargs_jax.signals import signals_wait

def ready():
    print("ready", flush=True)
"""


@pytest.fixture(autouse=True)
def children_get_signals():
    """Also if these tests run in the background of a shell, which makes its processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def started(*words, **options):
    """A Python process; standard output is piped, and standard error too unless the options say otherwise."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *map(str, words)], env=environment, text=True, **pipes | options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def running(program, **options):
    """A command whose `main` is the program; it says when it is ready."""
    body = "".join(f"    {line}\n" for line in program.strip().splitlines())
    return started("-c", f"{BEGINNING}\ndef main():\n{body}\nrun_as_command(main)", **options)


def ended(process):
    """Exit code, what is left of standard output, and standard error, of a process that ends soon."""
    printed, errors = process.communicate(timeout=QUICKLY)
    return process.returncode, printed, errors


# Python code that a library calls back: an exception in it is printed, if that, and lost.
CALLBACK = """
def callback():
    ready()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        pass
ctypes.CFUNCTYPE(None)(callback)()
"""
# The main thread runs no Python code at all, as while XLA compiles.
NO_PYTHON = "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 1_000_000_000)"
SWALLOWED = """
ready()
while True:
    try:
        time.sleep(30)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("number", WORDS, ids=lambda number: number.name)
@pytest.mark.parametrize("program", [CALLBACK, NO_PYTHON, SWALLOWED], ids=["callback", "no Python", "swallowed"])
def test_a_command_ends_at_once_whatever_it_is_doing(program, number):
    with running(program) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # until it is there
        process.send_signal(number)
        assert ended(process) == (CODES[number], "", WORDS[number])


def test_printed_output_is_not_lost():
    with running("print('the first answer'); sys.stderr.write('ready\\n'); time.sleep(30)") as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, "the first answer\n", "interrupted\n")


def test_a_reader_that_has_stopped_reading_does_not_hold_up_the_end():
    read, write = os.pipe()
    with running("ready()\nwhile True: print('row' * 1000)", stdout=write) as process:
        while os.read(read, 1) != b"\n":
            pass
        time.sleep(0.5)  # until the pipe is full, and the main thread holds the lock of standard output
        process.send_signal(signal.SIGINT)
        assert process.wait(QUICKLY) == 130 and process.stderr.read() == "interrupted\n"
    os.close(read)
    os.close(write)


def test_where_standard_error_is_closed_its_number_may_be_another_file(tmp_path):
    body = f"file = open({str(tmp_path / 'answers')!r}, 'w'); assert file.fileno() == 2\n{BEGINNING}\n"
    body += "run_as_command(lambda: (ready(), time.sleep(30)))"
    words = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, body]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(QUICKLY) == 130
    assert (tmp_path / "answers").read_text() == ""


def test_a_terminal_gets_its_cursor_back():
    bar = "from rich.progress import Progress\nwith Progress() as bar: bar.add_task('x', total=9); time.sleep(30)"
    outside, inside = pty.openpty()
    with running(bar, stdout=inside, stderr=inside) as process:
        os.close(inside)
        shown = b""
        while b"\x1b[?25l" not in shown or b"0%" not in shown:
            shown += os.read(outside, 1000)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while part := os.read(outside, 1000):
                shown += part
        assert process.wait(QUICKLY) == 130
    os.close(outside)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l") and shown.endswith(b"\ninterrupted\r\n")


def test_a_signal_that_is_ignored_stays_so():
    program = "ready(); os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)"
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{BEGINNING}\nrun_as_command(lambda: ("
    with started("-c", ignoring + program.replace(";", ",") + "))") as process:
        assert ended(process) == (0, "ready\n", "")


def test_python_has_its_handlers_back_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM)
    read, write = os.pipe()
    os.set_blocking(write, False)
    mine = signal.set_wakeup_fd(write)
    before = [signal.getsignal(number) for number in numbers]
    inside = []
    try:
        for _ in range(2):
            run_as_command(lambda: inside.extend(signal.getsignal(number) for number in numbers))
        assert [signal.getsignal(number) for number in numbers] == before and not set(inside) & set(before)
        assert not [thread for thread in threading.enumerate() if thread.name == "signals"]
    finally:
        assert signal.set_wakeup_fd(mine) == write
        os.close(read)
        os.close(write)


WAITING = """
with signals_wait() as stop:
    ready()
    time.sleep({seconds})
print(stop.number)
"""


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, "press Ctrl-C"), (signal.SIGTERM, "send SIGTERM")])
def test_the_first_signal_is_acknowledged_where_something_is_to_be_saved_and_the_second_ends_all(number, again):
    line = f"stopping after this step; {again} again to stop at once\n"
    with running(WAITING.format(seconds=30)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stderr.readline() == line
        process.send_signal(number)
        assert ended(process) == (CODES[number], "", WORDS[number])
    with running(WAITING.format(seconds=1)) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert ended(process) == (0, f"{number.value}\n", line)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model, and a reward model that goes by the text: it is fed by a callback."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    encoder = EncoderModel(TINY_DEBERTA.__class__(**{**vars(TINY_DEBERTA), "vocab_size": tokenizer.vocab_size}))
    model, params = tiny_model("llama", vocab_size=tokenizer.vocab_size)
    save_model(folder / "lm", model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    save_model(folder / "rm", encoder, random_params(encoder))
    for name in ("lm", "rm"):
        tokenizer.save(folder / name)
    return folder


def wait_for_the_first_line(process):
    """Waits while Python itself starts, until SIGTERM has a handler."""
    status = Path("/proc", str(process.pid), "status")
    while "SigCgt" in (text := status.read_text()):
        if int(text.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("script", "moments"), [("decode.py", (0, 0.2, 1, 2, 3, 5, 8)), ("train.py", (0, 0.2, 1, 3))])
def test_the_commands_end_at_once_at_any_time(script, moments, models, tmp_path):
    """While they import, load, compile, and run; `train.py` before its first step only waits for that one."""
    options = {
        "decode.py": ("--lm", models / "lm", "--rm", models / "rm", "--method", "pargs", "--max-new-tokens", 40,
                      "--prompt", "Hello", "--batch-size", 1),
        "train.py": ("--model.init", models / "lm", "--max-length", 64, "--out", tmp_path / "run", "--resume"),
    }[script]  # fmt: skip
    for moment in moments:
        with started(REPOSITORY / script, *options) as process:
            wait_for_the_first_line(process)
            time.sleep(moment)
            if process.poll() == 0:  # a quick machine
                break
            process.send_signal(signal.SIGINT)
            code, _, errors = ended(process)
        assert code == 130 and errors.endswith("interrupted\n"), (moment, code, errors)
        assert "Traceback" not in errors and "ignored" not in errors, (moment, errors)
