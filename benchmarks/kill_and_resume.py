"""Kills runs with SIGKILL at random moments, resumes them, and compares the end with that of a run left alone.

    python benchmarks/kill_and_resume.py --kills 25 --decode-kills 25

`train.py` and `decode.py` run as they would for anyone, on a tiny random Llama, with all that draws on randomness:
dropout, sampled prefixes, shuffled data; in one process and in two; training with batches as they are and packed, from
rows that are tokenised into a cache; decoding with rows that are filled again where an answer has ended. Each of these
is killed so many times. Of two processes, one is killed first, and the other up to half a second later. The table that
is printed is in docs/runs_that_cannot_be_lost.md.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pargs_jax.models.hf import save_model
from pargs_jax.testing import tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).parents[1]
SAVE_EVERY = 10
POLL = 0.001  # seconds; a save of this model takes some 50 times as long
EXACT = ("id", "sample", "prompt", "response", "finish_reason", "tokens", "lm_tokens", "rm_tokens")
NUMBERS = ("log_probability", "kl", "guide_reward")
STEPS_BETWEEN_KILLS, ANSWERS_BETWEEN_KILLS = 20, 6  # at most


@dataclass(frozen=True)
class Case:
    """A command that is killed so many times, in so many processes."""

    name: str
    processes: int
    kills: int
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.processes}".replace(" ", "-")

    @property
    def steps(self) -> int:
        return 40 + STEPS_BETWEEN_KILLS * self.kills

    @property
    def prompts(self) -> int:
        return 8 + ANSWERS_BETWEEN_KILLS * self.kills


def save_language_model(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    model, params = tiny_model("llama", "vocabulary", vocab_size=tokenizer.vocab_size)
    save_model(folder, model, params, special_tokens={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer.save(folder)


def write_rows(work: Path, prompts: int) -> None:
    """Pairs to train on, and prompts to answer."""
    pairs = [
        {
            "prompt": f"Customer: my lamp {i} broke\nAgent:",
            "chosen": f" Sorry{', sorry' * (i % 5)}.",
            "rejected": " No.",
        }
        for i in range(96)
    ]
    asked = [{"id": f"p{i}", "prompt": pairs[i % 96]["prompt"] + " So" * (i % 4)} for i in range(prompts)]
    for name, rows in {"pairs.jsonl": pairs, "prompts.jsonl": asked}.items():
        (work / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(work: Path, case: Case, out: str) -> list[str]:
    """The command of a run that uses all the randomness there is."""
    options = {
        "--out": work / case.folder / out, "--model.init": work / "lm", "--model.dropout": 0.1,
        "--data.train": work / "pairs.jsonl", "--data.held-out": 0.2, "--data.cache": work / f"{case.folder}-{out}",
        "--max-length": 64, "--steps": case.steps, "--save-every": SAVE_EVERY, "--eval-every": 100, "--log-every": 1,
        "--objective.sample": 4, "--optim.accumulation": 2, "--optim.weight-decay": 0.1, "--mesh": "cpu-2",
    }  # fmt: skip
    return [str(REPOSITORY / "train.py"), *(str(word) for pair in options.items() for word in pair), *case.options]


def decoding(work: Path, case: Case, out: str) -> list[str]:
    options = {
        "--lm": work / "lm", "--rm": work / "plain-1" / "alone", "--method": "pargs",
        "--prompts": work / "prompts.jsonl", "--limit": case.prompts, "--max-new-tokens": 16, "--batch-size": 4,
        "--out": work / case.folder / f"{out}.jsonl", "--mesh": "cpu-2",
    }  # fmt: skip
    return [str(REPOSITORY / "decode.py"), *(str(word) for pair in options.items() for word in pair)]


@contextmanager
def started(command: list[str], case: Case, work: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The command in processes of its own, which are killed in the end if they still run."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = ["--distributed", "--processes.coordinator", f"localhost:{free.getsockname()[1]}"]
    together += ["--processes.count", str(case.processes), "--processes.index"]
    own = [[*together, str(index)] if case.processes > 1 else [] for index in range(case.processes)]
    with (work / "log.txt").open("ab") as log:
        processes = [
            subprocess.Popen([sys.executable, *command, *words], env=environment, stdout=log, stderr=log)
            for words in own
        ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(command: list[str], case: Case, work: Path) -> None:
    with started(command, case, work) as processes:
        if any([process.wait() for process in processes]):
            raise SystemExit(f"{' '.join(command)} failed:\n{(work / 'log.txt').read_text()[-3000:]}")


def kill_when(
    condition: Callable[[], bool], delay: float, command: list[str], case: Case, work: Path, draw: random.Random
) -> None:
    """Starts the command, waits for the condition and `delay` seconds more, and sends SIGKILL."""
    with started(command, case, work) as processes:
        while all(process.poll() is None for process in processes) and not condition():
            time.sleep(POLL)
        time.sleep(delay)
        draw.shuffle(processes)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            # When one of several is killed, the others end by themselves; JAX aborts, if it is quicker than we are.
            if process.wait() not in {-signal.SIGKILL, *[2, -signal.SIGABRT] * (process is not processes[0])}:
                raise SystemExit(f"ended before it was killed:\n{(work / 'log.txt').read_text()[-3000:]}")
            time.sleep(draw.uniform(0, 0.5) if process is not processes[-1] else 0)


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


def kill_training(work: Path, case: Case, draw: random.Random) -> dict[str, Any]:
    """Kills and resumes; returns what to say of it."""
    folder = work / case.folder
    finish(training(work, case, "alone"), case, work)
    metrics, began = Metrics(folder / "again"), time.monotonic()
    kill_when(lambda: metrics.steps() > 0, 0, training(work, case, "again"), case, work, draw)
    startup = time.monotonic() - began

    run, command = folder / "killed", [*training(work, case, "killed"), "--resume"]
    aims = [("start", "step", "save", "step", "save")[number % 5] for number in range(case.kills)]
    draw.shuffle(aims)
    phases: Counter[str] = Counter()
    lost = 0
    for number, aim in enumerate(aims, 1):
        metrics = Metrics(run)
        if aim == "start":
            kill_when(lambda: True, draw.uniform(0.1, 0.95) * startup, command, case, work, draw)
        else:
            wanted, saving = draw.randint(1, STEPS_BETWEEN_KILLS), aim == "save"

            def reached(metrics: Metrics = metrics, wanted: int = wanted, saving: bool = saving) -> bool:
                return metrics.steps() >= wanted and is_saving(run) == saving

            kill_when(reached, draw.uniform(0, 0.03), command, case, work, draw)
        # Before the first step, what looks like a save is what the kill before left of one.
        phase = "start" if metrics.steps() == 0 else "save" if is_saving(run) else "step"
        done = max((line["step"] for line in whole_lines(run / "metrics.jsonl")), default=0)
        phases[phase] += 1
        lost += done - saved_step(run)
        print(
            f"{case.folder}, kill {number:2}: aimed at {aim}, hit {phase}; {done} steps done, {saved_step(run)} saved",
            flush=True,
        )
    finish(command, case, work)
    runs = [folder / name for name in ("alone", "killed")]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    return {
        "kills": case.kills,
        "while it started": phases["start"],
        "in a step": phases["step"],
        "in a save": phases["save"],
        "steps done again": f"{lost} of {case.steps}",
        "exported weights": compared(weights[0] == weights[1]),
        "last checkpoint": compared(
            all(np.array_equal(a, b) for a, b in zip(*map(arrays, runs), strict=True))  # weights, optimizer, step
        ),
        "losses": compared(losses(runs[0]) == losses(runs[1])),
    }


def kill_decoding(work: Path, case: Case, draw: random.Random) -> dict[str, Any]:
    """Kills soon after some rows were written, and goes on; returns what to say of it."""
    (work / case.folder).mkdir()
    finish(decoding(work, case, "alone"), case, work)
    out = work / case.folder / "killed.jsonl"
    for number in range(case.kills):
        wanted = len(whole_lines(out)) + draw.randint(1, ANSWERS_BETWEEN_KILLS)
        delay, command = draw.uniform(0, 0.03), decoding(work, case, "killed")
        kill_when(lambda wanted=wanted: len(whole_lines(out)) >= wanted, delay, command, case, work, draw)
        print(f"{case.folder}, kill {number + 1:2}: {len(whole_lines(out))} answers written", flush=True)
    finish(decoding(work, case, "killed"), case, work)
    return {"kills": case.kills, "prompts": case.prompts} | compared_answers(
        *(whole_lines(work / case.folder / f"{name}.jsonl") for name in ("alone", "killed"))
    )


def compared(is_same: bool) -> str:
    return "identical" if is_same else "DIFFERENT"


def arrays(run: Path) -> list[np.ndarray]:
    """Everything in the newest checkpoint."""
    from orbax.checkpoint import v1 as ocp

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(run / "checkpoints") as checkpoints:
        saved = checkpoints.metadata(saved_step(run)).metadata
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.load(saved_step(run), like))]


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["split"], line["loss"]) for line in whole_lines(run / "metrics.jsonl")]


def compared_answers(alone: list[dict[str, Any]], killed: list[dict[str, Any]]) -> dict[str, str]:
    """Texts and numbers of tokens, in order; and numbers, which are sums over rows of a width that depends on which
    prompts were left to answer together."""
    texts = [[tuple(row[name] for name in EXACT) for row in rows] for rows in (alone, killed)]
    pairs = [(a[name], b[name]) for a, b in zip(alone, killed, strict=False) for name in NUMBERS]
    largest = max((abs(a - b) / max(abs(a), abs(b)) for a, b in pairs if a != b), default=0.0)
    return {
        "answers, in the order of the prompts": compared(texts[0] == texts[1]),
        "largest difference of log-probabilities, KL and rewards": f"{largest:.1e}",
    }


def told(found: dict[str, Any]) -> dict[str, Any]:
    print(found, flush=True)
    return found


def print_table(title: str, columns: dict[str, dict[str, Any]]) -> None:
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for what in next(iter(columns.values())):
        print(f"| {what} | {' | '.join(str(column[what]) for column in columns.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=5, help="of train.py, plain and packed, with each number of processes"
    )
    parser.add_argument("--decode-kills", type=int, default=5, help="of decode.py, for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    draw, began = random.Random(given.seed), time.monotonic()
    ways = {"plain": (), "packed": ("--pack", "128")}
    trained = [Case(name, count, given.kills, options) for count in given.processes for name, options in ways.items()]
    decoded = [Case("decoding", count, given.decode_kills) for count in given.processes if given.decode_kills]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_language_model(work / "lm")
        write_rows(work, max([case.prompts for case in decoded], default=0))
        names = {
            case: f"{case.name}, {case.processes} process{'es' * (case.processes > 1)}" for case in trained + decoded
        }
        trainings = {names[case]: told(kill_training(work, case, draw)) for case in trained if case.kills}
        if decoded and not (work / "plain-1").exists():
            alone = Case("plain", 1, 0)
            finish(training(work, alone, "alone"), alone, work)  # the reward model
        decodings = {names[case]: told(kill_decoding(work, case, draw)) for case in decoded}
    print(f"\nseed {given.seed}, {time.monotonic() - began:.0f} s")
    for title, found in {"`train.py`": trainings, "`decode.py`": decodings}.items():
        if found:
            print_table(title, found)
    if "DIFFERENT" in str([trainings, decodings]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
