"""How a command's process ends: one line, the right code, and nothing that depends on the terminal."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pargs_jax.commands.process import LONGEST_LINE, run_as_command
from pargs_jax.errors import InputError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def ends_with(capsys):
    """Runs a command that raises an error; returns the exit code and what it printed on standard error."""

    def run(error, *advice):
        def main():
            raise error

        with pytest.raises(SystemExit) as caught:
            run_as_command(main, *advice)
        return caught.value.code, capsys.readouterr().err

    return run


def test_commands_end_with_one_line_and_the_right_code(ends_with):
    assert ends_with(InputError("pairs.jsonl: empty\nfile")) == (2, "error: pairs.jsonl: empty file\n")
    assert ends_with(KeyboardInterrupt()) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError("Unable to allocate 8 TiB"), "out of memory; use less"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while\nallocating"), "out of memory; use less"),
        (InputError("a\x1b[31mred\udcff"), "a\\x1b[31mred\\udcff"),
    ],
)
def test_what_the_system_refuses_is_one_line(ends_with, error, line):
    assert ends_with(error, "use less") == (2, f"error: {line}\n")


def test_a_long_argument_is_cut_in_an_error(ends_with):
    code, line = ends_with(InputError(f"--out: {'x' * 100_000} is too long"))
    assert code == 2 and len(line) < LONGEST_LINE + 20
    assert line.startswith("error: --out: xxx") and line.endswith("xxx is too long\n")


def test_the_stack_of_a_defect_is_saved_or_shown(ends_with, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, line = ends_with(ZeroDivisionError("by zero"))
    (file,) = tmp_path.iterdir()
    assert code == 2 and line == f"error: unexpected ZeroDivisionError (by zero); the stack is in {file}\n"
    assert "raise error" in file.read_text()
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "--seed", "1"])
    code, shown = ends_with(ZeroDivisionError("by zero"))
    assert code == 2 and "raise error" in shown and shown.endswith("error: unexpected ZeroDivisionError (by zero)\n")
    assert sys.argv == ["train.py", "--seed", "1"] and list(tmp_path.iterdir()) == [file]


PRINTS = (
    "import os, sys; from pargs_jax.commands.process import run_as_command\n"
    "def main():\n"
    "    file = open('own.txt', 'w'); file.write('mine'); file.flush(); print('né' * 5000)\n"
    "run_as_command(main)"
)


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        ("", 0, ""),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 2, "error: No space left on device\n"),
        ("2>/dev/full >/dev/full", 2, ""),
        ("| true", 141, ""),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_output_that_is_closed_full_or_ascii_does_no_harm(redirection, code, errors, encoding, tmp_path):
    ended = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}', sys.executable, PRINTS],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (code, errors)
    assert (tmp_path / "own.txt").read_text() == "mine"
    assert ended.stdout in ("", "n\\xe9" * 5000 + "\n" if encoding == "ascii" else "né" * 5000 + "\n")


SAVES = """
import os
from pargs_jax.commands.process import run_as_command

async def write():
    pass

def main():
    half_made = [write()]  # as a library that saves in the background leaves it
    files = [open(os.devnull) for _ in range(100)]

run_as_command(main)
"""


def test_a_limit_of_open_files_is_one_line():
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -n 24; exec "$0" -c "$1"', sys.executable, SAVES],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (2, f"error: {os.devnull}: Too many open files\n")
