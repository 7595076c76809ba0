"""The demo again and again: the commands of `make demo` with several training seeds, and what holds over all of them.

    pip install -e '.[studies]'
    python -m studies.demo.run                # 2 CPU cores: about four minutes a seed

A second run goes on where the first stopped. The language model, the prompts and the samplers' seeds are always those
of the demo; what differs is the training: the order of the pairs and the reward head's first weights.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from pargs_jax.commands.comparison import COMPARED
from pargs_jax.durable_files import write_whole
from studies.experiment import estimate, in_standard_errors
from studies.page import fill_page, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("studies/demo/results")
PAGE = Path("docs/study_demo.md")
OBJECTIVES = ("partial_bt", "bt", "arm")
ORDERS = (
    ("args_stochastic", "top_k"), ("pargs", "args_stochastic"), ("genarm", "args_stochastic"), ("pargs", "genarm"),
    ("pargs", "best_of_n"), ("args", "greedy"), ("pargs_greedy", "args"), ("pargs_greedy", "greedy"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/demo"), help="folder for models and answers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--seeds", type=int, default=5, help="training runs of every reward model")
    parser.add_argument("--limit", type=int, default=200, help="prompts")
    given = parser.parse_args()
    runs = [answers_of(given.out / f"seed-{seed}", seed, given.limit) for seed in range(given.seeds)]
    report(runs, given.results)


def answers_of(folder: Path, seed: int, limit: int) -> dict[str, dict[str, np.ndarray]]:
    """Trains and decodes in a folder as `make demo` does; returns true rewards and KL `[prompts]` of every method."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = folder / "answers.jsonl"
    if not answers.exists():
        for objective in OBJECTIVES:
            _command(folder, "train.py", "--objective.name", objective, "--seed", str(seed), "--resume")
        options = ("--batch-size", "100", "--max-new-tokens", "64", "--limit", str(limit))
        _command(folder, "decode.py", *options, "--out", answers.name)
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    return {
        method: {
            name: np.array([row[name] for row in sorted(rows, key=lambda row: row["id"]) if row["method"] == method])
            for name in ("true_reward", "kl")
        }
        for method in COMPARED
    }


def _command(folder: Path, door: str, *options: str) -> None:
    subprocess.run([sys.executable, str(ROOT / door), *options], cwd=folder, check=True)


def report(runs: list[dict[str, dict[str, np.ndarray]]], folder: Path) -> None:
    """Writes the numbers and the tables, and fills the documentation's page where these are the study's own."""
    rewards = {method: np.array([run[method]["true_reward"] for run in runs]) for method in COMPARED}
    kls = {method: np.array([run[method]["kl"] for run in runs]) for method in COMPARED}
    methods = table(
        ("method", "weight", "true reward", "KL, nats", *(f"run {number + 1}" for number in range(len(runs)))),
        [_row(method, weight, rewards[method], kls[method]) for method, weight in COMPARED.items()],
    )
    found = {(a, b): estimate(rewards[a] - rewards[b]) for a, b in ORDERS}
    orders = table(
        ("difference", "true reward", "in standard errors"),
        [(f"{a} - {b}", str(each), in_standard_errors(each)) for (a, b), each in found.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        method: {
            "true_reward": list(estimate(rewards[method])),
            "kl": list(estimate(kls[method])),
            "true_reward_by_training_run": rewards[method].mean(axis=1).tolist(),
        }
        for method in COMPARED
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1))
    write_whole(folder / "tables.md", f"{methods}\n{orders}")
    if folder == RESULTS:
        fill_page(PAGE, {"methods": methods, "orders": orders})
    print(methods, orders, sep="\n")


def _row(method: str, weight: float | None, rewards: np.ndarray, kls: np.ndarray) -> tuple[str, ...]:
    by_run = (f"{each:.2f}" for each in rewards.mean(axis=1))
    return method, "-" if weight is None else f"{weight:g}", str(estimate(rewards)), f"{kls.mean():.1f}", *by_run


if __name__ == "__main__":
    main()
