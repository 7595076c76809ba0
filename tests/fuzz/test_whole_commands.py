"""The commands themselves, in processes of their own, on odd input: they do their work or refuse it with one line.

A case is a command that works, with one of its files damaged or one option's value replaced. It fails on a stack trace
or an error that nobody foresaw, on an exit code that is not documented, on more than one line of error, if one of its
input files is altered, or if it neither ends nor obeys SIGTERM. A case takes seconds, so they are tried by hand: a
tenth of `FUZZ_CASES`.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.evaluation.config import EvaluateConfig
from pargs_jax.models.hf import save_model
from pargs_jax.options import options
from pargs_jax.testing import tiny_model, tiny_tokenizer
from tests.fuzz.odd import NUMBERS, TEXTS, damaged

REPOSITORY = Path(__file__).parents[2]
CASES = int(os.environ.get("FUZZ_CASES", 0)) // 10
PATIENCE = 120
"""Seconds after which a command is told to end: `--steps 1000000` is not wrong."""
MOST_MEMORY = 12 << 20
"""KiB; a batch of a million rows is refused, or runs out of memory and says so."""
COMMANDS = {
    "train.py": {
        "--model.init": "lm", "--data.train": "pairs.jsonl", "--steps": 4, "--save-every": 2, "--batch-size": 2,
        "--max-length": 32, "--out": "run", "--mesh": "cpu-1",
    },
    "decode.py": {
        "--lm": "lm", "--rm": "run/model", "--method": "pargs", "--prompts": "prompts.jsonl", "--max-new-tokens": 3,
        "--batch-size": 2, "--out": "answers.jsonl", "--mesh": "cpu-1",
    },
    "evaluate.py": {
        "--answers": "answers.jsonl", "--guide": "run/model", "--out": "report", "--no-figures": None,
        "--mesh": "cpu-1",
    },
}  # fmt: skip
CONFIGS = {"train.py": TrainConfig, "decode.py": DecodeConfig, "evaluate.py": EvaluateConfig}


def call(folder, command, given, compiled, patience=PATIENCE):
    """Runs a command in a folder; returns its exit code and what it said on stderr."""
    words = [word for flag, value in given.items() for word in [flag, value] if word is not None]
    limited = ["sh", "-c", f'ulimit -v {MOST_MEMORY}; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*limited, sys.executable, REPOSITORY / command, *map(str, words)],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": compiled, "HF_HUB_OFFLINE": "1",
                          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PARGS_JAX_CACHE": str(folder / "cache")},
    )  # fmt: skip
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(patience), process.stderr.read().decode()
        process.send_signal(signal.SIGTERM)
        return process.wait(patience), process.stderr.read().decode()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a model, rows, prompts, a run that ended, and answers; and a folder of compiled programs."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = tiny_tokenizer()
    model, params = tiny_model("llama", "vocabulary", vocab_size=tokenizer.vocab_size)
    save_model(folder / "lm", model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer.save(folder / "lm")
    rows = [{"prompt": f"Why {i}?", "chosen": " So.", "rejected": " No, no."} for i in range(4)]
    for name, kept in {"pairs.jsonl": ("prompt", "chosen", "rejected"), "prompts.jsonl": ("prompt",)}.items():
        text = "".join(json.dumps({field: row[field] for field in kept}) + "\n" for row in rows)
        (folder / name).write_text(text)
    compiled = str(tmp_path_factory.mktemp("compiled"))
    for command, given_options in COMMANDS.items():
        code, said = call(folder, command, given_options, compiled, patience=300)
        assert code == 0, said
    return folder, compiled


@st.composite
def odd_calls(draw):
    """A command, its options, and whether a file is to be damaged; if not, an option is odd."""
    command = draw(st.sampled_from(list(COMMANDS)))
    given_options = dict(COMMANDS[command])
    if command == "train.py":
        given_options |= draw(st.sampled_from([{}, {"--resume": None, "--steps": 6}]))
    if draw(st.booleans()):
        return command, given_options, True
    flags = [known.flag for known in options(CONFIGS[command])]
    value = draw(st.one_of(TEXTS.filter(is_word_without_path), NUMBERS.map(lambda number: f"{number}"[:400])))
    flag = draw(st.one_of(st.sampled_from(list(given_options)), st.sampled_from(flags)))
    return command, given_options | {flag: value}, False


def is_word_without_path(text):
    """Whether a shell could pass it on, and it leads nowhere outside the folder of the case."""
    return text.encode(errors="ignore").decode() == text and not any(part in text for part in ("/", "..", "\0"))


_numbers = itertools.count()


@pytest.mark.skipif(CASES == 0, reason="takes minutes; by hand: FUZZ_CASES=1000 python -m pytest tests/fuzz")
@settings(max_examples=max(CASES, 1), database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(odd_calls(), st.data())
def test_a_command_does_its_work_or_says_in_one_line_why_not(good, tmp_path_factory, odd, data):
    command, given_options, damages = odd
    folder = tmp_path_factory.getbasetemp() / "commands" / str(next(_numbers))
    shutil.copytree(good[0], folder)
    outputs = given_options["--out"] if isinstance(given_options["--out"], str) else ""
    if damages:
        file = data.draw(st.sampled_from(files_of(folder)), label="file")
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(data.draw(damaged(content[:4000])) + content[4000:])
    before = {file: (folder / file).read_bytes() for file in files_of(folder) if not belongs(file, outputs)}
    code, said = call(folder, command, given_options, good[1])
    assert code in {0, 2, 143} or (code == 1 and "warning: judge" in said), said
    assert "Traceback" not in said and "the stack is in" not in said, said
    assert [line.startswith("error: ") for line in said.splitlines()].count(True) == (code == 2), said
    assert {file: (folder / file).read_bytes() for file in before} == before
    shutil.rmtree(folder)


def files_of(folder):
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def belongs(file, out):
    """Whether a file is one that the command may write."""
    return file.startswith("cache/") or file == out or file.startswith((f"{out}/", f"{out}."))
