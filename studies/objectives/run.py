"""Two objectives: stories that are happy and written in short words, for any weighting of the two. GenARM, PARM, PARGS
with two reward models, and rewarded soups, by the fronts that they reach.

    pip install -e '.[studies]'
    python -m studies.objectives.run                            # stories260k, 2 CPU cores: less than an hour
    python -m studies.objectives.run --scale 0.02 --seeds 2 --train steps=2 --out runs/try --results runs/try
    python -m studies.objectives.run --lm meta-llama/Llama-3.2-1B --dtype bfloat16 --mesh gpu-1 --out runs/llama \\
        --results runs/llama/results --train optim.lr=1e-5      # the same with a real model

A second run goes on where the first stopped. The total weight of each method is picked on the prompts of the eval
split, by the hypervolume; everything that is reported is of the test split.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pargs_jax.commands.soup import soup
from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.answers import System
from studies.experiment import Study, decode, estimate, means_by_prompt, number_of, write_rows
from studies.objectives.fronts import hypervolume_estimate, inner_products, on_front
from studies.page import fill_page, table
from studies.stories import (
    K,
    informative,
    label,
    make_prompts,
    sample,
    share_of_wrong_labels,
    study_from,
    train_reward_models,
    valence,
)

PAGE = Path("docs/study_objectives.md")
FIGURE = Path("docs/study_objectives.png")
RESULTS = Path("studies/objectives/results")
PAIRS = 1000
"""Pairs of continuations, of which each reward labels those that differ in it."""
NOISE = 0.45
"""Of the labels, in standard deviations of a reward; that of the other studies of stories."""
REFERENCE = (-1.0, -1.0)
"""The hypervolume's reference point: one standard deviation below the language model's mean in both rewards."""
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of the first objective, in the preference vectors."""
PREFERENCES = np.array([(share, 1 - share) for share in SHARES])
TOTALS: dict[str, tuple[float, ...]] = {
    "genarm": (0.5, 1.0, 2.0, 4.0),
    "parm": (0.5, 1.0, 2.0, 4.0),
    "pargs": (2.0, 4.0, 8.0, 16.0),
    "soup": (1.0,),
}
"""Total weights that each method is tried at. A preference vector divides it between the two reward models; `parm` has
one model that takes the vector, and `soup` averages two tuned language models by it."""
NAMES = {"genarm": "GenARM", "parm": "PARM", "pargs": "PARGS", "soup": "rewarded soups (DPO)"}


def short_words(prompt: str, response: str) -> float:
    """Less the mean length of the response's words, in letters; 0 for a response without words."""
    words = re.findall(r"[a-z']+", response.lower())
    return -sum(map(len, words)) / len(words) if words else 0.0


MEASURES = {"valence": valence, "short words": short_words}


class Reward(NamedTuple):
    """A measure in standard deviations from its mean, both over the language model's own answers."""

    measure: str
    mean: float
    deviation: float

    def __call__(self, prompt: str, response: str) -> float:
        return (MEASURES[self.measure](prompt, response) - self.mean) / self.deviation


class Points(NamedTuple):
    """What a method reaches at a total weight with each preference vector, by training run and prompt."""

    rewards: Float[np.ndarray, "S Q N 2"]
    kls: Float[np.ndarray, "S Q N"]


def main(arguments: Sequence[str] | None = None) -> None:
    study, given = study_from(arguments, __doc__, "objectives", seeds=3, scale=0.5, batch_size=50)
    make_prompts(study)
    true, about = make_pairs(study)
    train_reward_models(study, models_of(study))
    totals = [(method, total) for method, all_of_it in TOTALS.items() for total in all_of_it]
    found = {
        (method, total): {split: points(study, method, total, split, true) for split in ("eval", "test")}
        for method, total in totals
    }
    unguided = {"method": "top_p", "top_p": 1.0}
    start = _rewards(decode(study, "test", unguided, "objectives/unguided.jsonl"), true)
    report(found, start, about, given.results)


def make_pairs(study: Study) -> tuple[list[Reward], dict[str, Any]]:
    """Makes the pairs of both objectives from the same continuations: a file for each, and one with both labels.
    Returns the true rewards, and what is to be said of the pairs."""
    samples = sample(study, "train")
    values = {name: [of(a.prompt, a.response) for a in samples.answers] for name, of in MEASURES.items()}
    rewards = [Reward(name, float(np.mean(found)), float(np.std(found))) for name, found in values.items()]
    labelled = [label(samples, reward, seed, NOISE)[:PAIRS] for seed, reward in enumerate(rewards)]
    said: dict[str, Any] = {"lm": study.lm, "training_runs": study.seeds}
    said["correlation"] = float(np.corrcoef(*values.values())[0, 1])
    for reward, pairs in zip(rewards, map(informative, labelled), strict=True):
        write_rows(study.pairs(reward.measure), (pair.row for pair in pairs))
        said[reward.measure] = {
            "mean": reward.mean, "deviation": reward.deviation, "pairs": len(pairs),
            "wrong labels": share_of_wrong_labels(pairs),
        }  # fmt: skip
    write_rows(
        study.pairs("both"),
        (
            {
                "prompt": pairs[0].first.prompt,
                "chosen": pairs[0].first.response,
                "rejected": pairs[0].second.response,
                "labels": [float(pair.first_is_chosen) if pair.difference else 0.5 for pair in pairs],
            }
            for pairs in zip(*labelled, strict=True)
            if pairs[0].first.response and pairs[0].second.response
        ),
    )
    return rewards, said


def models_of(study: Study) -> dict[str, dict[str, Any]]:
    """Three models for each objective, and PARM's for both, with their options of `train.py`."""
    own = {"arm": {}, "partial_bt": {}, "dpo": {"optim.lr": 5e-4}}
    models = {
        f"{objective}-{name}": {"objective.name": objective, "data.train": str(study.pairs(name)), **options}
        for objective, options in own.items()
        for name in MEASURES
    }
    return models | {"parm": {"data.train": str(study.pairs("both")), "objective.beta": 0.05, "optim.lr": 1e-2}}


def points(study: Study, method: str, total: float, split: str, true: Sequence[Reward]) -> Points:
    """Decodes a split with every training run and preference vector."""
    rewards, kls = [], []
    for seed in range(study.seeds):
        systems = []
        for share in SHARES:
            options = {**options_of(study, method, total, share, seed), "seed": seed}
            file = f"objectives/{split}_{method}_{total:g}_{share:g}_{seed}.jsonl"
            systems.append(decode(study, split, options, file))
        rewards.append(np.stack([_rewards(system, true) for system in systems], axis=1))
        kls.append(np.stack([_by_prompt(number_of("kl")(system)) for system in systems], axis=1))
    return Points(np.array(rewards), np.array(kls))


def options_of(study: Study, method: str, total: float, share: float, seed: int) -> dict[str, Any]:
    """Options of `decode.py`."""
    if method == "parm":
        return {
            "method": method, "rm": [str(study.model("parm", seed))], "weight": [total],
            "preference": [share, 1 - share],
        }  # fmt: skip
    if method == "soup":
        # At weight 1 the ratio to the language model is the soup's own distribution, and the record has its KL.
        return {"method": "expert_ratio", "rm": [_soup(study, share, seed), study.lm], "weight": [total]}
    objective = {"genarm": "arm", "pargs": "partial_bt"}[method]
    models = [str(study.model(f"{objective}-{name}", seed)) for name in MEASURES]
    options = {"method": method, "rm": models, "weight": [total * share, total * (1 - share)]}
    return {**options, "k": K} if method == "pargs" else options


def _soup(study: Study, share: float, seed: int) -> str:
    """The folder of the average of the two tuned language models."""
    first, second = (str(study.model(f"dpo-{name}", seed)) for name in MEASURES)
    if share in (0, 1):
        return first if share else second
    out = study.model(f"soup-{share:g}", seed)
    if not (out / "config.json").exists():
        soup([first, second], [share, 1 - share], out)
    return str(out)


def _rewards(system: System, rewards: Sequence[Reward]) -> Float[np.ndarray, "Q 2"]:
    """Both true rewards of each prompt's answer."""
    return np.stack([_by_prompt(means_by_prompt(system, reward)) for reward in rewards], axis=1)


def _by_prompt(values: dict[str, float]) -> Float[np.ndarray, "Q"]:
    return np.array([values[prompt] for prompt in sorted(values)])


def picked(found: dict[tuple[str, float], dict[str, Points]]) -> dict[str, float]:
    """The total weight of each method with the largest hypervolume on the prompts of the eval split."""
    return {
        method: max(all_of_it, key=lambda total: hypervolume_estimate(found[method, total]["eval"].rewards, REFERENCE))
        for method, all_of_it in TOTALS.items()
    }


def report(
    found: dict[tuple[str, float], dict[str, Points]],
    start: Float[np.ndarray, "Q 2"],
    about: dict[str, Any],
    folder: Path,
) -> None:
    """Writes the numbers, the tables and the figure, and fills the documentation's page where these are the study's
    own."""
    chosen = picked(found)
    shown = {method: found[method, total]["test"] for method, total in chosen.items()}
    numbers = {
        f"{method} {total:g}": {split: _summary(each) for split, each in splits.items()}
        for (method, total), splits in found.items()
    }
    methods = table(
        ("method", "total weight", "hypervolume", "mean inner product", "KL, nats", "hypervolume, run by run"),
        [_row(method, chosen[method], numbers[f"{method} {chosen[method]:g}"]["test"]) for method in TOTALS],
    )
    means = np.array([each.rewards.mean(axis=(0, 1)) for each in shown.values()])
    best = on_front(means.reshape(-1, 2)).reshape(means.shape[:2])
    every = table(
        ("method", "preference", *MEASURES, "KL, nats", "on the joint front"),
        [
            (
                NAMES[method], f"{share:g} : {1 - share:g}",
                *(str(estimate(each.rewards[:, :, n, i])) for i in range(2)),
                f"{each.kls[:, :, n].mean():.1f}", "yes" if best[m, n] else "",
            )
            for m, (method, each) in enumerate(shown.items())
            for n, share in enumerate(SHARES)
        ],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    unguided = [estimate([start[:, i].tolist()]) for i in range(2)]
    everything = {
        "about": about, "reference": REFERENCE, "preferences": PREFERENCES.tolist(), "unguided": unguided,
        "picked": chosen, "settings": numbers,
    }  # fmt: skip
    write_whole(folder / "results.json", json.dumps(everything, indent=1))
    write_whole(folder / "tables.md", f"{methods}\n{every}")
    is_own = folder == RESULTS
    draw(shown, start, FIGURE if is_own else folder / "figure.png")
    if is_own:
        fill_page(PAGE, {"methods": methods, "points": every, "about": _about(about, unguided)})
    print(methods, every, sep="\n")


def _summary(found: Points) -> dict[str, Any]:
    products = inner_products(PREFERENCES, found.rewards)
    return {
        "hypervolume": hypervolume_estimate(found.rewards, REFERENCE),
        "hypervolume_by_training_run": [hypervolume_estimate(run[None], REFERENCE).mean for run in found.rewards],
        "mean_inner_product": estimate(products),
        "mean_inner_product_by_training_run": products.mean(axis=1).tolist(),
        "rewards": found.rewards.mean(axis=(0, 1)).tolist(),
        "kl": found.kls.mean(axis=(0, 1)).tolist(),
    }


def _row(method: str, total: float, numbers: dict[str, Any]) -> tuple[str, ...]:
    by_run = ", ".join(f"{each:.2f}" for each in numbers["hypervolume_by_training_run"])
    return (
        NAMES[method], "-" if method == "soup" else f"{total:g}", str(numbers["hypervolume"]),
        str(numbers["mean_inner_product"]), f"{np.mean(numbers['kl']):.1f}", by_run,
    )  # fmt: skip


def _about(about: dict[str, Any], unguided: Sequence[Any]) -> str:
    parts = [
        f"{name}: mean {about[name]['mean']:.2f}, standard deviation {about[name]['deviation']:.2f}, "
        f"{about[name]['pairs']:,} pairs, {100 * about[name]['wrong labels']:.0f} % of the labels turned around"
        for name in MEASURES
    ]
    return (
        "; ".join(parts) + f". Over the language model's own answers the two have a correlation of "
        f"{about['correlation']:.2f}. Unguided answers to the test prompts have rewards of {unguided[0]} and "
        f"{unguided[1]}.\n"
    )


def draw(shown: dict[str, Points], start: Float[np.ndarray, "Q 2"], path: Path) -> None:
    """Both rewards of every method and preference vector, and where unguided answers are."""
    from matplotlib.figure import Figure

    from pargs_jax.evaluation.figures import COLOURS

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.add_subplot()
    for (method, found), colour in zip(shown.items(), COLOURS, strict=False):
        xs, ys = ([estimate(found.rewards[:, :, n, i]) for n in range(len(SHARES))] for i in range(2))
        axis.errorbar(
            [x.mean for x in xs], [y.mean for y in ys], [y.standard_error for y in ys],
            [x.standard_error for x in xs], color=colour, marker="o", markersize=4, capsize=2, label=NAMES[method],
        )  # fmt: skip
    axis.plot(*start.mean(axis=0), "s", color="black", label="unguided")
    names = list(MEASURES)
    axis.set_xlabel(f"{names[0]}, in standard deviations of unguided answers")
    axis.set_ylabel(f"{names[1]}, in the same unit")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
