"""Theorem 1 seen: how well models of full answers and of all prefixes rank unfinished stories, and where a search that
follows them ends.

    pip install -e '.[studies]'
    python -m studies.prefixes.run            # stories260k, 2 CPU cores; uses the models of studies.sentiment

The theorem (Rashid et al., 2024) says that a reward model that is trained on full answers alone may score prefixes
arbitrarily: any scores of prefixes have the same loss. The first part counts pairs whose better answer a model finds
when both are cut. The second part lets the language model write the first tokens of an answer, and then takes the
candidate with the highest reward at every step, whatever its probability: the true reward of what is added tells
whether the reward of a prefix is worth following.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pargs_jax.data.preferences import Preference
from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.prefixes import PERCENTS, model_prefix_rewards
from pargs_jax.evaluation.scoring import ScoringModel
from studies.experiment import MAX_NEW_TOKENS, Study, decode, estimate, means_by_prompt, write_rows
from studies.page import fill_page, table
from studies.stories import K, make_pairs, make_prompts, study_from, train_reward_models, valence

PAGE = Path("docs/study_prefixes.md")
FIGURE = Path("docs/study_prefixes.png")
OBJECTIVES = {"partial_bt": "all prefixes", "bt": "full answers"}
STARTS = (0, 16, 32, 48)
"""Tokens of the answer that the language model writes before the search."""
ONLY_REWARD = 1000.0
"""A weight at which the probabilities of the candidates do not matter."""


def main(arguments: Sequence[str] | None = None) -> None:
    study, given = study_from(arguments, __doc__, "prefixes")
    make_prompts(study)
    make_pairs(study)
    train_reward_models(study, {objective: {} for objective in OBJECTIVES})
    correct, ceiling = accuracies(study)
    report(correct, ceiling, searched(study), given.results, page=given.results == Path("studies/prefixes/results"))


def accuracies(study: Study) -> tuple[dict[str, list[Any]], float]:
    """Which pairs of the test split each model ranks as they are labelled, `[seeds][percents][pairs]`; and how often
    the true reward does, of the labels with their noise."""
    rows = [json.loads(line) for line in study.pairs("test").read_text(encoding="utf-8").splitlines()]
    pairs = [Preference(id=str(number), **row) for number, row in enumerate(rows)]
    true = [valence(p.prompt, p.chosen) > valence(p.prompt, p.rejected) for p in pairs]
    found: dict[str, list[Any]] = {objective: [] for objective in OBJECTIVES}
    for objective in OBJECTIVES:
        for seed in range(study.seeds):
            model = ScoringModel.load(str(study.model(objective, seed)), "reward", batch_size=study.batch_size)
            rewards = model_prefix_rewards(model, pairs, 128).same_length
            found[objective].append((0.5 + 0.5 * np.sign(rewards[..., 0] - rewards[..., 1])).T.tolist())
    return found, float(np.mean(true))


def searched(study: Study) -> dict[str, dict[str, Any]]:
    """The true reward of what is added to each start, `[seeds][prompts]`: by the language model, and by the search
    for the highest reward."""
    found: dict[str, dict[str, Any]] = {name: {} for name in ("sampled", *OBJECTIVES)}
    for start in STARTS:
        split = "test"
        if start:
            split = f"test_after_{start}"
            begun = decode(
                study, "test", {"method": "top_k", "k": K, "max_new_tokens": start, "seed": 7}, f"begun_{start}.jsonl"
            )
            write_rows(study.prompts(split), ({"id": a.id, "prompt": a.prompt + a.response} for a in begun.answers))
        rest = {"max_new_tokens": MAX_NEW_TOKENS - start}
        sampled = decode(study, split, {"method": "top_k", "k": K, **rest}, f"prefixes/sampled_{start}.jsonl")
        found["sampled"][str(start)] = [_values(sampled)]
    for objective in OBJECTIVES:
        for seed in range(study.seeds):
            for start in STARTS:
                options = {
                    "method": "pargs_greedy",
                    "rm": [str(study.model(objective, seed))],
                    "weight": [ONLY_REWARD],
                    "max_new_tokens": MAX_NEW_TOKENS - start,
                }
                split = f"test_after_{start}" if start else "test"
                system = decode(study, split, options, f"prefixes/{objective}_{seed}_{start}.jsonl")
                found[objective].setdefault(str(start), []).append(_values(system))
    return found


def _values(system: Any) -> list[float]:
    values = means_by_prompt(system, valence)
    return [values[prompt] for prompt in sorted(values)]


def report(
    correct: dict[str, list[Any]], ceiling: float, found: dict[str, dict[str, Any]], folder: Path, *, page: bool
) -> None:
    """Writes the numbers, the tables and the figure, and with `page` the documentation's page."""
    ranked = {
        name: [estimate(np.array(values)[:, f]) for f in range(len(PERCENTS))] for name, values in correct.items()
    }
    gaps = [
        estimate(np.array(correct["partial_bt"])[:, f] - np.array(correct["bt"])[:, f]) for f in range(len(PERCENTS))
    ]
    shown = [PERCENTS.index(percent) for percent in (10, 20, 30, 50, 70, 90, 100)]
    accuracy = table(
        ("trained on", *(f"{PERCENTS[f]} %" for f in shown)),
        [
            *(
                (OBJECTIVES[name], *("{:.3f} ± {:.3f}".format(*each[f]) for f in shown))
                for name, each in ranked.items()
            ),
            ("difference", *("{:.3f} ± {:.3f}".format(*gaps[f]) for f in shown)),
        ],
    )
    names = {"sampled": "the language model, sampled", **{k: f"reward, {v}" for k, v in OBJECTIVES.items()}}
    search = table(
        ("who goes on", *(f"after {start}" for start in STARTS)),
        [(label, *(str(estimate(found[name][str(s)])) for s in STARTS)) for name, label in names.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "accuracy": {name: [list(each) for each in values] for name, values in ranked.items()},
        "accuracy_by_training_run": {name: np.mean(values, axis=2).tolist() for name, values in correct.items()},
        "difference": [list(each) for each in gaps],
        "percents": list(PERCENTS),
        "labels_that_agree_with_the_true_reward": ceiling,
        "search": {name: {s: list(estimate(v)) for s, v in each.items()} for name, each in found.items()},
        "search_by_training_run": {
            name: {s: np.mean(v, axis=1).tolist() for s, v in each.items()} for name, each in found.items()
        },
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1))
    write_whole(folder / "tables.md", f"{accuracy}\n{search}")
    draw(ranked, ceiling, found, FIGURE if page else folder / "figure.png")
    if page:
        agree = f"The true reward agrees with {100 * ceiling:.1f} % of these labels.\n"
        fill_page(PAGE, {"accuracy": accuracy, "search": search, "ceiling": agree})
    print(accuracy, search, sep="\n")


def draw(ranked: dict[str, Any], ceiling: float, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of the answers that is seen, and what the search yields against where it starts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    accuracy, search = figure.subplots(1, 2)
    colours = {"partial_bt": "#0072b2", "bt": "#d55e00", "sampled": "#808080"}
    labels = {**OBJECTIVES, "sampled": "language model, sampled"}
    for name, estimates in ranked.items():
        means, errors = 100 * np.array(estimates).T
        accuracy.errorbar(PERCENTS, means, errors, color=colours[name], marker="o", markersize=4, label=labels[name])
    accuracy.axhline(100 * ceiling, color="black", linestyle="--", linewidth=1, label="the true reward, whole answers")
    accuracy.axhline(50, color="black", linestyle=":", linewidth=1)
    accuracy.set(xlabel="% of both answers seen", ylabel="pairs ranked as labelled, %")
    for name, by_start in found.items():
        means, errors = np.array([estimate(by_start[str(start)]) for start in STARTS]).T
        search.errorbar(STARTS, means, errors, color=colours[name], marker="o", markersize=4, label=labels[name])
    search.set(xlabel="tokens written before the search", ylabel="valence of what is added", xticks=STARTS)
    for axis in (accuracy, search):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
