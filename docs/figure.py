"""Draws docs/demo.png from the demo's runs and answers (needs matplotlib):

make demo
python decode.py --out runs/demo_answers.jsonl
python docs/figure.py runs/demo_answers.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

FRACTIONS = (10, 25, 50, 75, 100)
RUNS = {"all prefixes (PARGS)": "runs/partial_bt", "full answers (ARGS)": "runs/bt"}
COLORS = {"all prefixes (PARGS)": "#1b7f79", "full answers (ARGS)": "#c8553d"}


def last_evaluation(run: str) -> dict[str, float]:
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "eval"][-1]


def true_rewards(path: str) -> dict[str, np.ndarray]:
    by_method: dict[str, list[float]] = defaultdict(list)
    for row in map(json.loads, Path(path).read_text().splitlines()):
        by_method[row["method"]].append(row["true_reward"])
    return {method: np.array(values) for method, values in by_method.items()}


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for label, run in RUNS.items():
        values = last_evaluation(run)
        left.plot(FRACTIONS, [values[f"accuracy_{f}"] for f in FRACTIONS], "o-", label=label, color=COLORS[label])
    left.set(xlabel="% of the answer that is seen", ylabel="held-out pair accuracy", ylim=(0.4, 0.8))
    left.set_title("reward models, trained on ...", fontsize=10)
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.legend(frameon=False, fontsize=9)

    rewards = true_rewards(sys.argv[1])
    means = [values.mean() for values in rewards.values()]
    errors = [values.std(ddof=1) / np.sqrt(len(values)) for values in rewards.values()]
    kinds = ["grey" if m in ("greedy", "top_k") else list(COLORS.values())[m.startswith("args")] for m in rewards]
    right.barh(list(rewards), means, xerr=errors, color=kinds, capsize=3)
    right.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="true reward (oracle; the best answer earns 4.5)")
    right.set_title(f"{len(next(iter(rewards.values())))} unseen prompts, mean and standard error", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("demo.png"), dpi=150)


if __name__ == "__main__":
    main()
