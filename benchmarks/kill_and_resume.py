"""Kills runs with SIGKILL at random moments, resumes them, and compares the end with that of a run left alone.

    python benchmarks/kill_and_resume.py --kills 20 --decode-kills 5

`train.py` and `decode.py` run as they would for anyone, on a tiny random Llama and the demo task, with all that draws
on randomness: dropout, sampled prefixes, shuffled data. The last table printed is in docs/runs_that_cannot_be_lost.md.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).parents[1]
STEPS, SAVE_EVERY, PROMPTS = 400, 10, 48
POLL = 0.001  # seconds; a save of this model takes some 50 times as long


def save_language_model(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    model, params = tiny_model("llama", "vocabulary", vocab_size=tokenizer.vocab_size)
    save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer.save(folder)


def training(work: Path, out: str) -> list[str]:
    """The command of a run that uses all the randomness there is."""
    options = {
        "--out": work / out, "--model.init": work / "lm", "--model.dropout": 0.1, "--data.demo-pairs": 64,
        "--max-length": 64, "--steps": STEPS, "--save-every": SAVE_EVERY, "--eval-every": 100, "--log-every": 1,
        "--objective.sample": 4, "--optim.accumulation": 2, "--optim.weight-decay": 0.1,
    }  # fmt: skip
    return [sys.executable, str(REPOSITORY / "train.py"), *(str(word) for pair in options.items() for word in pair)]


def decoding(work: Path, out: str) -> list[str]:
    options = {
        "--lm": work / "lm", "--rm": work / "alone", "--method": "pargs", "--prompts": work / "prompts.jsonl",
        "--max-new-tokens": 16, "--batch-size": 2, "--out": work / out,
    }  # fmt: skip
    return [sys.executable, str(REPOSITORY / "decode.py"), *(str(word) for pair in options.items() for word in pair)]


@contextmanager
def started(command: list[str], work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, which is killed in the end if it still runs."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with (work / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(command: list[str], work: Path) -> None:
    with started(command, work) as process:
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{(work / 'log.txt').read_text()[-3000:]}")


def kill_when(condition: Callable[[], bool], delay: float, command: list[str], work: Path) -> None:
    """Starts the command, waits for the condition and `delay` seconds more, and sends SIGKILL."""
    with started(command, work) as process:
        while process.poll() is None and not condition():
            time.sleep(POLL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"ended before it was killed:\n{(work / 'log.txt').read_text()[-3000:]}")


def saved_step(run: Path) -> int:
    """The newest checkpoint's step; 0 if there is none."""
    return max((int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit()), default=0)


def is_saving(run: Path) -> bool:
    return any(run.glob("checkpoints/*.orbax-checkpoint-tmp"))


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, less a last one that is cut off."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


class Metrics:
    """What a run that is just started adds to its `metrics.jsonl`, which it begins by replacing."""

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"
        self._file_before = self._path.stat().st_ino if self._path.exists() else None
        self._first = saved_step(run)

    def steps(self) -> int:
        """Steps done since the start."""
        if not self._path.exists() or self._path.stat().st_ino == self._file_before:
            return 0
        return max((line["step"] for line in whole_lines(self._path)), default=self._first) - self._first


def kill_training(work: Path, kills: int, startup: float, draw: random.Random) -> tuple[Counter[str], int]:
    """Kills and resumes; returns how often in which phase, and how many steps had to be done again."""
    run, command = work / "killed", [*training(work, "killed"), "--resume"]
    aims = [("start", "step", "save", "step", "save")[number % 5] for number in range(kills)]
    draw.shuffle(aims)
    phases: Counter[str] = Counter()
    lost = 0
    for number, aim in enumerate(aims, 1):
        metrics = Metrics(run)
        if aim == "start":
            kill_when(lambda: True, draw.uniform(0.1, 0.95) * startup, command, work)
        else:
            wanted, saving = draw.randint(1, 20), aim == "save"

            def reached(metrics: Metrics = metrics, wanted: int = wanted, saving: bool = saving) -> bool:
                return metrics.steps() >= wanted and is_saving(run) == saving

            kill_when(reached, draw.uniform(0, 0.03), command, work)
        # Before the first step, what looks like a save is what the kill before left of one.
        phase = "start" if metrics.steps() == 0 else "save" if is_saving(run) else "step"
        done = max((line["step"] for line in whole_lines(run / "metrics.jsonl")), default=0)
        phases[phase] += 1
        lost += done - saved_step(run)
        print(f"kill {number:2}: aimed at {aim}, hit {phase}; {done} steps done, {saved_step(run)} saved", flush=True)
    finish(command, work)
    return phases, lost


def kill_decoding(work: Path, kills: int, draw: random.Random) -> None:
    """Kills soon after some rows were written, and goes on."""
    out = work / "killed.jsonl"
    for _ in range(kills):
        wanted = len(whole_lines(out)) + draw.randint(1, 6)
        delay = draw.uniform(0, 0.03)
        kill_when(lambda wanted=wanted: len(whole_lines(out)) >= wanted, delay, decoding(work, out.name), work)
    finish(decoding(work, out.name), work)


def arrays(run: Path) -> list[np.ndarray]:
    """Everything in the newest checkpoint."""
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(run / "checkpoints") as checkpoints:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.load(saved_step(run)))]


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["split"], line["loss"]) for line in whole_lines(run / "metrics.jsonl")]


def answers(path: Path) -> list[dict[str, Any]]:
    """Rows by id, less the time they took."""
    return sorted(({**row, "seconds": None} for row in whole_lines(path)), key=lambda row: row["id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of train.py")
    parser.add_argument("--decode-kills", type=int, default=5, help="of decode.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw = random.Random(given.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_language_model(work / "lm")
        rows = [{"id": f"p{i}", "prompt": f"Customer: my lamp {i} broke\nAgent:"} for i in range(PROMPTS)]
        (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        finish(training(work, "alone"), work)
        metrics, again = Metrics(work / "again"), time.monotonic()
        kill_when(lambda: metrics.steps() > 0, 0, training(work, "again"), work)
        startup = time.monotonic() - again
        phases, lost = kill_training(work, given.kills, startup, draw)
        finish(decoding(work, "alone.jsonl"), work)
        kill_decoding(work, given.decode_kills, draw)

        alone, killed = work / "alone", work / "killed"
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (alone, killed)]
        same_state = all(np.array_equal(a, b) for a, b in zip(arrays(alone), arrays(killed), strict=True))
        rows_alone, rows_killed = answers(work / "alone.jsonl"), answers(work / "killed.jsonl")
        table = {
            "kills of `train.py`": given.kills,
            "... while it started (imports, data, restore, compilation)": phases["start"],
            "... in a step, with no save in progress": phases["step"],
            "... in the middle of a save": phases["save"],
            f"steps done again (of {STEPS}, a save every {SAVE_EVERY})": lost,
            "exported weights, byte by byte": "identical" if weights[0] == weights[1] else "DIFFERENT",
            "last checkpoint (weights, optimizer, step), bit by bit": "identical" if same_state else "DIFFERENT",
            "losses in metrics.jsonl, line by line": "identical" if losses(alone) == losses(killed) else "DIFFERENT",
            "kills of `decode.py`": given.decode_kills,
            f"answers ({PROMPTS} prompts), none lost or twice": (
                "identical" if rows_alone == rows_killed and len(rows_killed) == PROMPTS else "DIFFERENT"
            ),
        }
    print(f"\nseed {given.seed}, {time.monotonic() - began:.0f} s\n\n| what | result |\n|---|---:|")
    for what, result in table.items():
        print(f"| {what} | {result} |")
    if "DIFFERENT" in table.values():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
