"""Faults that really happen to a file of answers: kills, full disks, two commands at once."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from pargs_jax.commands.command_line import parse
from pargs_jax.commands.generate import generate
from pargs_jax.config import DecodeConfig
from pargs_jax.data.preferences import Prompt
from pargs_jax.errors import InputError
from pargs_jax.generation.output import AnswersFile
from pargs_jax.generation.session import Answer

REPOSITORY = Path(__file__).parents[2]
CONFIG = DecodeConfig(lm="lm", method="greedy", prompts="prompts.jsonl")
PROMPTS = [Prompt("p0", "prompt"), Prompt("p1", "prompt")]


def answer(number, response="fine"):
    return Answer(f"p{number}", "prompt", response, "stop", -1.0, 0.0, (), 3, 0.5)


def ids(path):
    return [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_line_cut_off_in_the_middle_of_a_character_is_answered_again(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, CONFIG) as file:
        file.write([answer(0, "one\u2028row"), answer(1, "naïve")])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index("ï".encode()) + 1])
    with AnswersFile(path, CONFIG) as file:
        assert file.answered(PROMPTS) == [[True], [False]]
        file.write([answer(1, "naïve")])
    assert path.read_bytes() == whole


def test_a_second_command_on_one_file_is_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path, CONFIG) as file:
        with pytest.raises(InputError, match="another decode\\.py is writing it"):
            AnswersFile(path, CONFIG)
        file.write([answer(0)])
    with AnswersFile(path, CONFIG) as file:
        assert file.answered(PROMPTS) == [[True], [False]]


def test_a_full_disk_keeps_the_answers_before_and_loses_none_after(tmp_path):
    path = tmp_path / "answers.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswersFile(path, CONFIG) as file:
        file.write([answer(0)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        try:
            with pytest.raises(InputError) as caught:
                file.write([answer(1)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    advice = "earlier answers are safe; fix that, then run the same command again"
    assert str(caught.value) == f"{path}: cannot be written (File too large); {advice}"
    with AnswersFile(path, CONFIG) as file:
        assert file.answered(PROMPTS) == [[True], [False]]
        file.write([answer(1)])
    assert ids(path) == ["p0", "p1"]


def test_a_killed_command_goes_on_with_no_row_lost_or_twice(lm, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    names = [f"p{number}" for number in range(200)]
    prompts.write_text("".join(json.dumps({"id": name, "prompt": f"My {name} broke."}) + "\n" for name in names))
    options = {
        "--lm": lm, "--method": "greedy", "--prompts": prompts, "--out": out, "--max-new-tokens": 8, "--batch-size": 2
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "decode.py"), *words],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not (out.exists() and out.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = ids(out)
    assert 0 < len(before) < len(names)
    generate(parse(DecodeConfig, words, prog="decode.py", description=""), Console(file=io.StringIO()))
    after = ids(out)
    assert after[: len(before)] == before and sorted(after) == sorted(names)
