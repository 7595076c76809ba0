"""What HH can tell: reward models trained on full answers and on all prefixes, on Anthropic's helpful and harmless
pairs, and how many pairs it would take to tell the two apart.

    python -m studies.hh.run                                                  # stories260k, 2 CPU cores: 20 minutes
    python -m studies.hh.run --report                                         # from the results that are there
    python -m studies.hh.run --seeds 2 --steps 2 --out runs/try --results runs/try/results    # does all of it run?
    python -m studies.hh.run --init meta-llama/Llama-3.2-1B --dtype bfloat16 --mesh gpu-1 --optim.lr 1e-5 \
        --out runs/hh_llama --results runs/hh_llama/results                   # the same with a real model

Every option that is not listed below is one of train.py. A second run does only what is missing. The data are
`hh_harmless` and `hh_helpful`, `.train.jsonl.gz` and `.test.jsonl.gz`, in SHARED/data: rows of `prompt`, `chosen` and
`rejected`.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from pargs_jax.commands.command_line import parse
from pargs_jax.commands.process import run_as_command
from pargs_jax.commands.train import train
from pargs_jax.config import TrainConfig
from pargs_jax.data.preferences import load_preferences
from pargs_jax.durable_files import write_whole
from pargs_jax.errors import InputError
from pargs_jax.evaluation.prefixes import model_prefix_rewards
from pargs_jax.evaluation.scoring import ScoringModel
from pargs_jax.evaluation.statistics import Estimate, holm
from pargs_jax.mesh import start
from pargs_jax.options import deciding_values
from pargs_jax.text.prompts import get_form
from studies.hh.effects import Effect, detectable, effect
from studies.page import fill_page, table

SETS = {"harmless": 2312, "helpful": 2354}
"""The sets (harmless-base, helpful-base), and how many pairs their published test splits have."""
SHARES = (10, 25, 50, 75, 100)
"""Percentages of the longer answer that are seen."""
KINDS = {"bt": "full answers", "partial_bt": "all prefixes"}
"""Objectives, and what they train on. The second is compared with the first."""
PAGE, FIGURE = Path("docs/study_hh.md"), Path("docs/study_hh.png")
MARKS = "01="
"""How a pair went: wrong, right, or a tie."""

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and scores what is missing, then reports."""
    args, options = parse_arguments(arguments)
    results = args.results / "models.jsonl"
    if not args.report:
        models = list(planned(args, options))
        with jax.set_mesh(start(models[0].config)):
            for model in models:
                settings, name = settings_of(model.config, args.limit), (model.set, model.kind, model.config.seed)
                if name not in done(results, settings):
                    print(*name, flush=True)
                    train(model.config)
                    row = dict(zip(("set", "kind", "seed"), name, strict=True)) | {"settings": settings}
                    add(results, row | score(model, args.limit))
    if not results.exists():
        raise InputError(f"{results}: is missing; run this without --report first")
    report(read(results), args.results, args.page)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The study's own options, and the words for train.py."""
    summary, description = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--init", help="model that training starts from (default: SHARED/models/stories260k)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which pairs")
    parser.add_argument("--seeds", type=int, default=5, help="training runs of each kind; at least 2")
    parser.add_argument("--limit", type=int, help="score only the first N held-out pairs (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/studies/hh"), help="folder for the trained models")
    parser.add_argument("--results", type=Path, default=Path("studies/hh/results"), help="folder for the results")
    parser.add_argument("--report", action="store_true", help=f"only report, and write the tables into {PAGE}")
    args, options = parser.parse_known_args(arguments)
    args.page = PAGE if args.report else None
    if args.seeds < 2:
        raise InputError(f"--seeds: got {args.seeds}, must be at least 2, or nothing is known of other training runs")
    return args, options


class Planned(NamedTuple):
    """A model to train: its set, its objective, the config of its training run, and the pairs that it is tested on."""

    set: str
    kind: str
    config: TrainConfig
    held_out: Path


def planned(args: argparse.Namespace, options: Sequence[str]) -> Iterator[Planned]:
    """Every model. Raises InputError if the data are not there, or for an option that train.py does not have."""
    init = args.init or str(args.shared / "models" / "stories260k")
    if args.init is None and not Path(init).is_dir():
        raise InputError(f"{init}: is not there; give --init MODEL, or the folder that has it as --shared")
    for set_name in args.sets:
        files = [args.shared / "data" / f"hh_{set_name}.{split}.jsonl.gz" for split in ("train", "test")]
        for missing in (file for file in files if not file.exists()):
            raise InputError(f"{missing}: is not there; give the folder that has data/{missing.name} as --shared")
        for seed in range(args.seeds):
            for kind in KINDS:
                run = args.out / f"{set_name}-{kind}-{seed}"
                words = ["--config", "configs/hh.yaml", "--model.init", init, "--data.train", str(files[0])]
                words += ["--objective.name", kind, "--seed", str(seed), "--out", str(run), "--save-every", "0"]
                config = parse(TrainConfig, [*words, "--resume", *options], prog="train.py", description="")
                yield Planned(set_name, kind, config, files[1])


def settings_of(config: TrainConfig, limit: int | None) -> dict[str, Any]:
    """What decides a model's results besides its set, objective and seed."""
    deciding = deciding_values(config)
    for name in ("seed", "objective.name", "data.train"):
        deciding.pop(name)
    deciding["model.init"] = Path(config.model.init).name
    return deciding | {"steps": config.steps, "epochs": config.epochs, "limit": limit}


def score(planned: Planned, limit: int | None) -> Row:
    """Whether a trained model is right, on every held-out pair at every share, and which pairs have the same prompt."""
    config = planned.config
    model = ScoringModel.load(str(config.output_folder), "reward", dtype=config.dtype)
    form = get_form(config.data.format)
    pairs = load_preferences(planned.held_out, form, tokenizer=model.tokenizer, split="eval").rows[:limit]
    rewards = model_prefix_rewards(model, pairs, config.max_length, SHARES)
    signs = np.sign(rewards.same_length[..., 0] - rewards.same_length[..., 1]).astype(int)
    marks = np.array(list(MARKS))[np.where(signs == 0, 2, signs > 0)]
    correct = {str(share): "".join(marks[:, f]) for f, share in enumerate(SHARES)}
    return {"prompts": rewards.groups.tolist(), "correct": correct}


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def add(results: Path, row: Row) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    before = results.read_text() if results.exists() else ""
    write_whole(results, before + json.dumps(row) + "\n")


def done(results: Path, settings: Mapping[str, Any]) -> set[tuple[str, str, int]]:
    """The models whose results are there. Raises InputError if these were made with other settings."""
    rows = read(results) if results.exists() else []
    for row in rows:
        if row["settings"] != json.loads(json.dumps(settings)):
            changed = [name for name, value in settings.items() if row["settings"].get(name) != value]
            raise InputError(f"{results}: was made with another {', '.join(changed)}; give another --results and --out")
    return {(row["set"], row["kind"], row["seed"]) for row in rows}


def prompt_means(rows: Sequence[Row], share: int) -> Float[np.ndarray, "S N"]:
    """How right models are on each prompt, from 0 to 1; a tie counts half. One row for each model, by seed."""
    value = dict(zip(MARKS, (0.0, 1.0, 0.5), strict=True))
    found = []
    for row in sorted(rows, key=lambda row: row["seed"]):
        correct, prompts = [value[mark] for mark in row["correct"][str(share)]], np.array(row["prompts"])
        found.append(np.bincount(prompts, weights=correct) / np.bincount(prompts))
    return np.stack(found)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Both kinds of model at one share of one set: accuracies with their standard errors over seeds, and the effect."""

    set: str
    share: int
    pairs: int
    prompts: int
    accuracies: dict[str, Estimate]
    effect: Effect


def compare(rows: Sequence[Row]) -> list[Compared]:
    """Every share of every set. Raises InputError if a set lacks models of one kind."""
    found = []
    for set_name in dict.fromkeys(row["set"] for row in rows):
        of_kind = {kind: [row for row in rows if (row["set"], row["kind"]) == (set_name, kind)] for kind in KINDS}
        seeds = [sorted(row["seed"] for row in models) for models in of_kind.values()]
        if seeds[0] != seeds[1]:
            raise InputError(
                f"{set_name}: has seeds {seeds[0]} of one kind and {seeds[1]} of the other; finish the run"
            )
        for share in SHARES:
            values = [prompt_means(models, share) for models in of_kind.values()]
            accuracies = {kind: Estimate.of(each.mean(axis=1)) for kind, each in zip(KINDS, values, strict=True)}
            pairs = len(of_kind["bt"][0]["prompts"])
            found.append(Compared(set_name, share, pairs, values[0].shape[1], accuracies, effect(values[1], values[0])))
    return found


def report(rows: Sequence[Row], folder: Path, page: Path | None) -> None:
    """Writes `results.json`, the tables and the figure; into the page too, if there is one."""
    compared = compare(rows)
    tables = {
        "verdict": verdict(compared),
        "differences": difference_table(compared),
        "pairs": pairs_table(compared),
    }
    for name, text in tables.items():
        write_whole(folder / f"{name}.md", text)
        print(text)
    found = [
        dataclasses.asdict(each)
        | {
            "accuracies": {kind: value._asdict() for kind, value in each.accuracies.items()},
            "effect": plain(each.effect),
        }
        for each in compared
    ]
    write_whole(
        folder / "results.json", json.dumps({"settings": rows[0]["settings"], "compared": found}, indent=1) + "\n"
    )
    draw(compared, folder / "differences.png")
    if page is not None:
        fill_page(page, tables)
        draw(compared, FIGURE)
        print(f"wrote {page} and {FIGURE}")


def plain(value: Any) -> Any:
    """Named tuples as dictionaries, infinite and unknown numbers as None."""
    if hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def verdict(compared: Sequence[Compared]) -> str:
    """What the differences tell, in words."""
    adjusted = holm([each.effect.overall.p for each in compared])
    means = [each.effect.overall.mean for each in compared]
    clear = [each for each, p in zip(compared, adjusted, strict=True) if p < 0.05]
    named = ", ".join(f"{each.set} at {each.share} % ({points(each.effect.overall.mean)})" for each in clear)
    enough = sum(each.effect.needed <= SETS[each.set] for each in compared)
    return (
        f"Models of all prefixes are ahead in {sum(mean > 0 for mean in means)} of {len(means)} comparisons, by "
        f"{points(min(means))} to {points(max(means))} points. After Holm's correction, "
        f"{named or 'none of them'} can be told from chance. In {enough} of {len(means)}, the published test split has "
        "the pairs that a difference of the measured size needs.\n"
    )


def difference_table(compared: Sequence[Compared]) -> str:
    adjusted = holm([each.effect.overall.p for each in compared])
    rows = [
        [
            each.set,
            f"{each.share} %",
            *(f"{value.mean:.3f} ± {value.standard_error:.3f}" for value in each.accuracies.values()),
            points(each.effect.overall.mean),
            *(interval(of.interval) for of in (each.effect.over_prompts, each.effect.over_seeds, each.effect.overall)),
            f"{each.effect.overall.p:.2f}",
            f"{p:.2f}",
        ]
        for each, p in zip(compared, adjusted, strict=True)
    ]
    headings = ["set", "seen", *KINDS.values(), "difference", "over prompts", "over runs", "over both", "p", "Holm"]
    return table(headings, rows)


def pairs_table(compared: Sequence[Compared]) -> str:
    rows = [
        [
            each.set,
            f"{each.share} %",
            points(each.effect.overall.mean),
            f"{100 * each.effect.discordant:.0f} %",
            f"{each.effect.standardised:.3f}",
            count(each.effect.needed),
            count(each.effect.needed_at_least),
            f"{100 * detectable(each.pairs, each.effect.discordant):.1f} ({each.pairs:,})",
            f"{100 * detectable(SETS[each.set], each.effect.discordant):.1f} ({SETS[each.set]:,})",
        ]
        for each in compared
    ]
    headings = ["set", "seen", "difference", "differ on", "effect", "pairs needed", "at least"]
    return table([*headings, "seen with the pairs here", "with the published test split"], rows)


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def count(pairs: float) -> str:
    """Pairs, rounded up to two digits; more than a million of them are nothing to count."""
    if pairs > 1e6:
        return "over a million"
    digits = 10 ** max(0, int(np.log10(max(pairs, 1))) - 1)
    return f"{int(np.ceil(pairs / digits)) * digits:,}"


def draw(compared: Sequence[Compared], path: Path) -> None:
    """Differences with their intervals by share, one panel for each set, and what could be detected."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(each.set for each in compared))
    figure = Figure(figsize=(4.6 * len(sets), 4.2), layout="constrained")
    for axis, set_name in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets, strict=True):
        here = [each for each in compared if each.set == set_name]
        places = range(len(here))
        for word, pairs, colour in (
            ("the pairs here", [each.pairs for each in here], "#e8e8e8"),
            ("the published test split", [SETS[set_name]] * len(here), "#d0d0d0"),
        ):
            least = [100 * detectable(n, each.effect.discordant) for n, each in zip(pairs, here, strict=True)]
            label = f"too small to detect with\n{word} ({pairs[0]:,})"
            axis.fill_between(places, [-x for x in least], least, color=colour, label=label, linewidth=0)
        for place, each in zip(places, here, strict=True):
            runs = 100 * np.array(each.effect.by_seed)
            label = None if place else "a training run"
            axis.plot([place + 0.15] * len(runs), runs, "o", color="#56b4e9", markersize=3, label=label)
            mean = 100 * each.effect.overall.mean
            for found, width, label in (
                (each.effect.overall, 1.2, None),
                (each.effect.over_prompts, 3.5, "mean; thick: 95 % over prompts,\nthin: over prompts and runs"),
            ):
                reach = [[mean - 100 * found.interval.low], [100 * found.interval.high - mean]]
                axis.errorbar(place, mean, reach, fmt="o", color="#1a1b1c", markersize=5, elinewidth=width,
                              label=None if place else label)  # fmt: skip
        axis.axhline(0, color="#1a1b1c", linewidth=0.8, linestyle=":")
        axis.set_xticks(places, [f"{each.share} %" for each in here])
        axis.set_xlabel("of the longer answer seen")
        axis.set_title(set_name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy of all prefixes\nless that of full answers, points")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_as_command(main)
