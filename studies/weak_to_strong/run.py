"""Weak to strong: reward models made of a weak, small language model guide the demo's, which has five times the
weights, by every method of `decode.py`, beside tuning either (Table 1 of PARGS, and the weak-to-strong part of GenARM,
at the demo's size).

    pip install -e '.[studies]'
    python -m studies.weak_to_strong.run                       # 2 CPU cores: less than an hour
    python -m studies.weak_to_strong.run --scale 0.02 --seeds 1 --train steps=2 --out runs/try --results runs/try

The first run trains the weak language model (configs/demo_small_lm.yaml). With real models, on a GPU, both learn the
demo's task first:

    python train.py --objective.name sft --model.init meta-llama/Llama-3.2-1B --optim.lr 1e-5 --out runs/weak
    python train.py --objective.name sft --model.init meta-llama/Llama-3.1-8B --optim.lr 1e-5 --out runs/strong
    python -m studies.weak_to_strong.run --weak runs/weak/model --lm runs/strong/model --dtype bfloat16 \\
        --mesh gpu-1 --scale 1 --out runs/llama --results runs/llama/results --train optim.lr=1e-5 lora.rank=16

A second run goes on where the first stopped. Weights are picked on the prompts of the eval split, by the true reward;
everything that is reported is of the test split.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pargs_jax.commands.demo import model_source
from pargs_jax.commands.train import train
from pargs_jax.config import DEMO, TrainConfig
from pargs_jax.config_files import from_mapping, read_yaml
from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.cost import token_operations
from pargs_jax.models.hf import describe_model, stored_head
from pargs_jax.models.sources import resolve
from studies.experiment import (
    MAX_NEW_TOKENS,
    Setting,
    Study,
    difference,
    estimate,
    in_standard_errors,
    open_study,
    study_parser,
    summary,
    train_models,
)
from studies.page import fill_page, table
from studies.weak_to_strong.methods import ENTRIES, STRONG, WEAK, Entry, make_data, measure, models_of, picked

PAGE = Path("docs/study_weak_to_strong.md")
FIGURE = Path("docs/study_weak_to_strong.png")
RESULTS = Path("studies/weak_to_strong/results")
CONFIG = Path("configs/demo_small_lm.yaml")
TRAINED = ("partial_bt", "bt", "arm", "dpo", "farma", "distill", f"{STRONG}dpo", f"{STRONG}ppo", f"{STRONG}rloo")
"""With every seed; the other models once."""
EQUAL = "best_of_n partial_bt n=2"
"""The best-of-n whose operations are nearest to those of PARGS."""
PAIRS = (
    ("pargs partial_bt", "top_k"), ("pargs partial_bt", "args_stochastic bt"), ("pargs partial_bt", EQUAL),
    ("genarm arm", "top_k"), ("genarm arm", EQUAL), ("pargs partial_bt", "genarm arm"),
    ("cd distill", "pargs partial_bt"), (f"expert_ratio dpo {WEAK}", "top_k by dpo"),
    (f"expert_ratio dpo {WEAK}", f"top_k by {STRONG}dpo"), ("pargs partial_bt", "top_k by dpo"),
    ("pargs partial_bt", f"top_k by {STRONG}dpo"), ("pargs partial_bt", f"top_k by {STRONG}ppo"),
    ("pargs partial_bt", f"top_k by {STRONG}rloo"), (f"top_k by {STRONG}ppo", f"top_k by {STRONG}rloo"),
)  # fmt: skip
CURVES = ("pargs partial_bt", "args_stochastic bt", "genarm arm", "cd distill", f"expert_ratio dpo {WEAK}")


def main(arguments: Sequence[str] | None = None) -> None:
    study, given = study_from(arguments)
    make_data(study)
    for seed in range(study.seeds):
        models = models_of(study, seed, given.weak)
        train_models(study, {name: models[name] for name in (models if seed == 0 else TRAINED)}, [seed])
    found = measure(study, given.weak, TRAINED)
    add_operations(study, given.weak, found)
    report(found, study.seeds, given.results)


def study_from(arguments: Sequence[str] | None) -> tuple[Study, argparse.Namespace]:
    """Reads the command line, and trains the weak language model unless another one is given."""
    parser = study_parser(__doc__, "weak_to_strong", DEMO)
    parser.set_defaults(seeds=3, batch_size=50)
    parser.add_argument("--weak", help="what weak reward models start from (default: a fifth of the demo's model)")
    given = parser.parse_args(arguments)
    study = open_study(given, "demo")
    if given.weak is None:
        folder = study.folder / "weak_lm"
        given.weak = str(folder / "model")
        if not (folder / "model" / "model.safetensors").exists():
            options = {**read_yaml(CONFIG), "out": str(folder), "resume": folder.exists()}
            train(from_mapping(TrainConfig, options, str(CONFIG)))
    return study, given


def add_operations(study: Study, weak_lm: str, found: Mapping[str, Setting]) -> None:
    """Adds the operations that the tokens of both models cost, in 10^9 for an answer (`test gflop`)."""
    every = {entry.name: entry for entry in ENTRIES}
    for setting in found.values():
        entry = every[setting["entry"]]
        models = {name: str(study.model(name, 0)) for name in entry.trained} | {WEAK: weak_lm}
        lm = study.lm if not entry.lm else models[entry.lm]
        guides = [models[name] for name in entry.models]
        cost = np.multiply(setting["test lm_tokens"], operations(lm))
        if guides:  # the tokens of all guides together, which are of one size
            cost = cost + np.multiply(setting["test rm_tokens"], np.mean(list(map(operations, guides))))
        setting["test gflop"] = (cost / 1e9).tolist()


def operations(source: str) -> float:
    """Of a model on one token in the middle of a text; of its head too, where that is as wide as the vocabulary."""
    folder = resolve(model_source(source))
    head = stored_head(folder)
    model = describe_model(folder, head)
    width = 0 if head == "reward" else model.config.vocab_size * model.config.head_width
    return token_operations(model, seen=MAX_NEW_TOKENS) + 2 * width


def report(found: dict[str, Setting], seeds: int, folder: Path) -> None:
    """Writes the numbers, the tables and the figure, and fills the documentation's page where these are the study's
    own."""
    chosen = picked(found)
    methods = table(
        ("method", "models", "weight", "true reward", "KL, nats", "LM tokens", "RM tokens", "Gflop", "ms"),
        [_row(entry, found[chosen[entry.name]]) for entry in ENTRIES],
        texts=2,
    )
    differences = table(
        ("difference", "true reward", "standard errors"),
        [
            (f"{a} - {b}", str(gap), in_standard_errors(gap))
            for a, b in PAIRS
            for gap in [difference(found[chosen[a]], found[chosen[b]], "reward")]
        ],
    )
    runs = {name: found[setting]["test reward"] for name, setting in chosen.items()}
    spread = table(
        ("method", *(f"run {seed + 1}" for seed in range(seeds))),
        [(name, *(f"{np.mean(each):.2f}" for each in values)) for name, values in runs.items() if len(values) > 1],
    )
    if seeds == 1:
        spread = "There was one training run of each model.\n"
    folder.mkdir(parents=True, exist_ok=True)
    about = {"training_runs": seeds, "picked": chosen, "settings": summary(found)}
    write_whole(folder / "results.json", json.dumps(about, indent=1))
    write_whole(folder / "tables.md", "\n".join([methods, differences, spread]))
    is_own = folder == RESULTS
    draw(found, chosen, FIGURE if is_own else folder / "figure.png")
    if is_own:
        fill_page(PAGE, {"methods": methods, "differences": differences, "runs": spread})
    print(methods, differences, spread, sep="\n")


def _row(entry: Entry, setting: Setting) -> tuple[str, ...]:
    def of(metric: str, form: str = "{:.0f}") -> str:
        return form.format(*estimate(setting[f"test {metric}"]))

    what = f"{entry.method} {entry.label}".strip()
    models = ", ".join(entry.models) or (f"decodes itself: {entry.lm}" if entry.lm else "-")
    weight = "-" if setting["weight"] is None else f"{setting['weight']:g}"
    milliseconds = 1000 * estimate(setting["test seconds"]).mean
    return (
        what, models, weight, of("reward", "{:.2f} ± {:.2f}"), "-" if entry.lm else of("kl", "{:.1f}"),
        of("lm_tokens"), of("rm_tokens"), of("gflop", "{:.2f}"), f"{milliseconds:.0f}",
    )  # fmt: skip


def draw(found: dict[str, Setting], chosen: dict[str, str], path: Path) -> None:
    """True reward against KL, a curve for each guided method over its weight, and against the operations of an
    answer."""
    from matplotlib.figure import Figure

    from pargs_jax.demo.task import frontier
    from pargs_jax.evaluation.figures import COLOURS

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    ceiling = np.array(frontier(np.geomspace(0.2, 50, 60).tolist()))
    axes[0].plot(*ceiling.T, color="black", linestyle="--", linewidth=1, label="best possible (exact)")
    bests = [entry.name for entry in ENTRIES if entry.method == "best_of_n"]
    curves = {name: [setting for setting in found.values() if setting["entry"] == name] for name in CURVES}
    curves["best of n"] = [found["top_k"], *(found[chosen[name]] for name in bests)]
    markers = {
        "top_k": "s",
        "top_k by dpo": "D",
        f"top_k by {STRONG}dpo": "^",
        f"top_k by {STRONG}ppo": "v",
        f"top_k by {STRONG}rloo": "<",
    }
    for axis, metric in zip(axes, ("kl", "gflop"), strict=True):
        for (name, settings), colour in zip(curves.items(), COLOURS, strict=False):
            is_shown = settings if metric == "kl" or name == "best of n" else [found[chosen[name]]]
            means, errors = zip(*(estimate(each["test reward"]) for each in is_shown), strict=True)
            xs = [np.mean(each[f"test {metric}"]) for each in is_shown]
            axis.errorbar(xs, means, errors, color=colour, marker="o", markersize=4, capsize=2, label=name)
        for name, marker in markers.items():
            x = np.mean(found[name][f"test {metric}"])
            # The KL of a tuned model is not from the guided language model, so it has no place there.
            if metric == "gflop" or name == "top_k":
                y, error = estimate(found[name]["test reward"])
                axis.errorbar([x], [y], [error], color="black", marker=marker, capsize=2)
                axis.annotate(name, (x, y), (5, -3), textcoords="offset points", fontsize=8)
        axis.grid(alpha=0.25)
        axis.set_ylabel("true reward (oracle) ± standard error")
    axes[0].set_xscale("symlog", linthresh=1.0)
    axes[0].set(xlabel="KL from the language model, nats an answer", xlim=(0, 100), ylim=(-3, 8.2))
    axes[1].set(xlabel="operations of an answer, Gflop", xscale="log", ylim=(-3, 8.2))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
