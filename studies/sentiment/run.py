"""The sentiment of stories: every method on the same prompts, guided by models trained on pairs of the language
model's own samples, over several training runs.

    pip install -e '.[studies]'
    python -m studies.sentiment.run                                          # stories260k, 2 CPU cores: about an hour
    python -m studies.sentiment.run --scale 0.02 --seeds 2 --out runs/try --results runs/try     # does all of it run?
    python -m studies.sentiment.run --lm meta-llama/Llama-3.2-1B --dtype bfloat16 --mesh gpu-1 --out runs/llama \
        --results runs/llama/results --train optim.lr=1e-5 lora.rank=16      # the same with a real model

A second run goes on where the first stopped. Weights are picked on the prompts of the eval split, by the true reward;
everything that is reported is of the test split.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.text_metrics import repetition
from studies.experiment import (
    Metrics,
    Setting,
    Study,
    add_numbers,
    best_on_eval,
    decode,
    difference,
    estimate,
    in_standard_errors,
    means_by_prompt,
    number_of,
    summary,
)
from studies.page import fill_page, table
from studies.stories import K, make_pairs, make_prompts, polarity, study_from, train_reward_models, valence

PAGE = Path("docs/study_sentiment.md")
FIGURE = Path("docs/study_sentiment.png")
REWARD_MODELS: dict[str, dict[str, Any]] = {"partial_bt": {}, "bt": {}, "arm": {}}
"""The objectives that guide, with their options of `train.py` beyond those that all share."""


class Entry(NamedTuple):
    """A method of the study: its reward model's objective, the weights that it is tried at, and its other options."""

    method: str
    objective: str | None = None
    weights: tuple[float, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)


ENTRIES = (
    Entry("greedy"),
    Entry("contrastive"),
    Entry("args", "bt", (0.5, 1.0, 2.0, 4.0)),
    Entry("pargs_greedy", "partial_bt", (1.0, 2.0, 4.0, 8.0)),
    Entry("top_k", options={"k": K}),
    Entry("top_p"),
    Entry("args_stochastic", "bt", (0.5, 1.0, 2.0, 4.0), {"temperature": 1.0}),
    Entry("vas", "partial_bt", (2.0, 4.0, 8.0), {"k": K}),
    Entry("genarm", "arm", (0.5, 1.0, 2.0, 4.0)),
    Entry("pargs", "partial_bt", (1.0, 2.0, 4.0, 8.0)),
    Entry("best_of_n", "bt", (), {"k": K, "search": {"samples": 10}}),
    Entry("speculative_rejection", "partial_bt", (), {"k": K, "search": {"samples": 10, "chunk": 16}}),
    Entry("blockwise", "partial_bt", (), {"k": K, "search": {"successors": 10, "chunk": 16}}),
    Entry("chunk_beam", "partial_bt", (), {"k": K, "temperature": 1.0}),
    Entry("cards", "partial_bt", (), {"k": K, "temperature": 1.0}),
    Entry("smc", "partial_bt", (1.0,), {"search": {"particles": 10}}),
)
"""What is not here needs a reward model that this study does not train (docs/methods.md)."""

CURVES = {
    "pargs": "PARGS",
    "args_stochastic": "ARGS, sampled",
    "genarm": "GenARM",
    "pargs_greedy": "PARGS-G",
    "args": "ARGS, greedy",
}
KS = (2, 5, 10, 40)
K_CURVES = (Entry("pargs", "partial_bt", (4.0,)), Entry("args_stochastic", "bt", (1.0,), {"temperature": 1.0}))
METRICS: Metrics = {
    "valence": lambda system: means_by_prompt(system, valence),
    "polarity": lambda system: means_by_prompt(system, polarity),
    "repetition": lambda system: means_by_prompt(system, lambda _, text: repetition(text) or 0.0),
    **{name: number_of(name) for name in ("kl", "log_probability", "lm_tokens", "rm_tokens", "seconds")},
}


def main(arguments: Sequence[str] | None = None) -> None:
    study, given = study_from(arguments, __doc__, "sentiment")
    make_prompts(study)
    about = {"lm": study.lm, "training_runs": study.seeds, **make_pairs(study)}
    train_reward_models(study, REWARD_MODELS)
    found = measure(study)
    report(found, about, given.results, page=given.results == Path("studies/sentiment/results"))


def measure(study: Study) -> dict[str, Setting]:
    """Decodes all settings; returns the metrics of each by `method weight k`: values `[seeds][prompts]`."""
    jobs: list[tuple[Entry, float | None, dict[str, Any]]] = []
    for entry in ENTRIES:
        jobs += [(entry, weight, {}) for weight in entry.weights or (None,)]
    jobs += [(entry, entry.weights[0], {"k": k}) for entry in K_CURVES for k in KS if k != K]
    # One reward model after the other, so that each is loaded and compiled once.
    jobs.sort(key=lambda job: (job[0].objective or "", job[0].method))
    found: dict[str, Setting] = {}
    for objective in sorted({entry.objective or "" for entry, _, _ in jobs}):
        for seed in range(study.seeds if objective else 1):
            for entry, weight, more in jobs:
                if (entry.objective or "") == objective:
                    _measure_one(study, entry, weight, more, seed, found)
    return found


def _measure_one(
    study: Study, entry: Entry, weight: float | None, more: dict[str, Any], seed: int, found: dict[str, Setting]
) -> None:
    options = {"method": entry.method, **entry.options, **more, "seed": seed}
    if entry.objective is not None:
        options["rm"] = [str(study.model(entry.objective, seed))]
    if weight is not None:
        options["weight"] = [weight]
    words = [entry.method, *([] if weight is None else [f"w{weight:g}"]), *(f"k{k}" for k in more.values())]
    name = " ".join(words)
    file = "_".join([*words, *([f"seed{seed}"] if entry.objective else [])])
    setting = found.setdefault(
        name, {"method": entry.method, "weight": weight, "k": more.get("k", K), "objective": entry.objective}
    )
    is_curve = len(entry.weights) > 1
    for split in ("eval", "test") if is_curve and not more else ("test",):
        system = decode(study, split, options, f"answers/{split}_{file}.jsonl")
        add_numbers(setting, split, system, METRICS if split == "test" else {"valence": METRICS["valence"]})


def picked(found: dict[str, Setting]) -> dict[str, str]:
    """The setting of each method: the weight with the highest true reward on the prompts of the eval split."""
    tried = {name: setting for name, setting in found.items() if setting["k"] == K}
    return {
        entry.method: best_on_eval({n: s for n, s in tried.items() if s["method"] == entry.method}, "valence")
        for entry in ENTRIES
    }


def report(found: dict[str, Setting], about: dict[str, Any], folder: Path, *, page: bool) -> None:
    """Writes the numbers, the tables and the figure, and with `page` the documentation's page and figure."""
    chosen = picked(found)
    folder.mkdir(parents=True, exist_ok=True)
    results = table(
        ("method", "guided by", "weight", "valence", "polarity", "KL", "log p", "rep-4", "LM tokens", "RM tokens"),
        [_row(found[name]) for name in chosen.values()],
        texts=2,
    )
    orders = [
        ("args_stochastic", "top_k"), ("pargs", "args_stochastic"), ("pargs", "top_k"), ("args", "greedy"),
        ("pargs_greedy", "greedy"), ("pargs_greedy", "args"), ("genarm", "top_k"), ("pargs", "genarm"),
        ("best_of_n", "top_k"), ("pargs", "best_of_n"),
    ]  # fmt: skip
    differences = table(
        ("difference", "valence", "standard errors", "polarity", "log p"),
        [_difference(found[chosen[a]], found[chosen[b]], a, b) for a, b in orders],
    )
    spread = table(
        ("method and weight", *(f"run {seed + 1}" for seed in range(about["training_runs"]))),
        [
            (name, *(f"{np.mean(each):.2f}" for each in found[name]["test valence"]))
            for name in chosen.values()
            if found[name]["objective"]
        ],
    )
    numbers = summary(found)
    write_whole(folder / "results.json", json.dumps({"about": about, "picked": chosen, "settings": numbers}, indent=1))
    write_whole(folder / "tables.md", "\n".join([results, differences, spread]))
    draw(found, chosen, FIGURE if page else folder / "figure.png")
    if page:
        fill_page(PAGE, {"table": results, "differences": differences, "runs": spread, "about": _about(about)})
    print(results, differences, spread, sep="\n")


def _about(about: dict[str, Any]) -> str:
    return (
        f"{about['train_pairs']:,} pairs, whose continuations differ by {about['train_mean_difference']:.2f} on "
        f"average; the noise turned {100 * about['train_labels_against_the_valence']:.0f} % of the labels around.\n"
    )


def _row(setting: Setting) -> tuple[str, ...]:
    def of(metric: str, form: str = "{:.2f} ± {:.2f}") -> str:
        return form.format(*estimate(setting[f"test {metric}"]))

    weight = "-" if setting["weight"] is None else f"{setting['weight']:g}"
    return (
        setting["method"], setting["objective"] or "-", weight, of("valence"), of("polarity", "{:.3f} ± {:.3f}"),
        of("kl", "{:.1f}"), of("log_probability", "{:.0f}"), of("repetition", "{:.2f}"), of("lm_tokens", "{:.0f}"),
        of("rm_tokens", "{:.0f}"),
    )  # fmt: skip


def _difference(setting: Setting, other: Setting, name: str, other_name: str) -> tuple[str, ...]:
    found = difference(setting, other, "valence")
    return (
        f"{name} - {other_name}", str(found), in_standard_errors(found),
        "{:.3f} ± {:.3f}".format(*difference(setting, other, "polarity")),
        "{:.0f} ± {:.0f}".format(*difference(setting, other, "log_probability")),
    )  # fmt: skip


def draw(found: dict[str, Setting], chosen: dict[str, str], path: Path) -> None:
    """True reward and the second lexicon's against KL, a curve for each method over its weight; and true reward against
    the number of candidates."""
    from matplotlib.figure import Figure

    from pargs_jax.evaluation.figures import COLOURS

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    reward, second, ks = figure.subplots(1, 3)
    for axis, metric in ((reward, "valence"), (second, "polarity")):
        for (method, label), colour in zip(CURVES.items(), COLOURS, strict=False):
            points = [s for s in found.values() if s["method"] == method and s["k"] == K]
            points.sort(key=lambda setting: setting["weight"])
            xs = [np.mean(each["test kl"]) for each in points]
            ys = [estimate(each[f"test {metric}"]) for each in points]
            means, errors = zip(*ys, strict=True)
            axis.errorbar(xs, means, errors, color=colour, marker="o", markersize=4, capsize=2, label=label)
            for setting, x, y in zip(points, xs, means, strict=True):
                axis.annotate(f"{setting['weight']:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7)
        for method, marker in {"top_k": "s", "greedy": "D", "best_of_n": "^", "smc": "v"}.items():
            setting = found[chosen[method]]
            x, y = np.mean(setting["test kl"]), np.mean(setting[f"test {metric}"])
            axis.plot(x, y, marker, color="black", markersize=6, label=method)
        axis.set(xlabel="KL from the language model, nats an answer", ylabel=f"{metric} ± standard error")
        axis.set_xscale("log")
        axis.set_xticks(ticks := (2, 5, 10, 20, 50, 100), [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    for entry, colour in zip(K_CURVES, COLOURS, strict=False):
        points = [s for s in found.values() if s["method"] == entry.method and s["weight"] == entry.weights[0]]
        points.sort(key=lambda setting: setting["k"])
        means, errors = zip(*(estimate(each["test valence"]) for each in points), strict=True)
        label = f"{CURVES[entry.method]}, weight {entry.weights[0]:g}"
        ks.errorbar([s["k"] for s in points], means, errors, color=colour, marker="o", markersize=4, label=label)
    ks.set(xlabel="candidates k", ylabel="valence ± standard error", xscale="log", xticks=KS)
    ks.set_xticks(KS, [str(k) for k in KS])
    ks.minorticks_off()
    ks.grid(alpha=0.25)
    ks.legend(fontsize=8)
    handles, labels = reward.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
