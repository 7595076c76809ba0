"""Every decoding method on real data: stories260k answers HH's prompts, guided by models of every kind that were
trained on HH's pairs, and another reward model, of other pairs, judges the answers.

    pip install -e '.[studies]'
    python -m studies.hh.methods --train steps=50                           # 2 CPU cores: about 20 minutes
    python -m studies.hh.methods                                            # an epoch of each model, 241 steps
    python -m studies.hh.methods --scale 0.1 --train steps=2 --out runs/try --results runs/try
    python -m studies.hh.methods --lm meta-llama/Llama-3.2-1B --dtype bfloat16 --mesh gpu-1 --out runs/llama \\
        --results runs/llama/results --train optim.lr=1e-5                  # the same with a real model

Everything runs as the commands do: the data are files of SHARED/data, or files that `decode.py` wrote. A second run
does what is missing. No weight is tuned: each is one of those that the study of weak to strong tried.
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pargs_jax.durable_files import write_whole
from pargs_jax.evaluation.answers import System
from pargs_jax.evaluation.scoring import ScoringModel
from studies.experiment import (
    Setting,
    Study,
    add_numbers,
    decode,
    estimate,
    means_by_prompt,
    number_of,
    open_study,
    study_parser,
    summary,
    train_models,
    write_rows,
)
from studies.page import fill_page, table
from studies.weak_to_strong.methods import ENTRIES, STRONG, WEAK, Entry

PAGE = Path("docs/study_hh_methods.md")
RESULTS = Path("studies/hh/results_methods")
PROMPTS = {"train": 200, "test": 60}
LONGEST_PROMPT = 240
"""In characters; the language model's tokens have about three."""
SAMPLES = 8
"""Answers to each training prompt, for the objectives that learn from scored answers."""
JUDGE = "judge"


def main(arguments: Sequence[str] | None = None) -> None:
    study, given = study_from(arguments)
    data = given.shared / "data"
    make_prompts(study, data)
    pairs = str(data / "hh_helpful.train.jsonl.gz")
    judge = {"objective.name": "bt", "data.train": str(data / "hh_helpful.test.jsonl.gz")}
    from_pairs = {name: {"objective.name": name, "data.train": pairs} for name in ("partial_bt", "bt", "farma")}
    # Log-probabilities of whole answers differ by hundreds of nats: GenARM's own factor for HH, and for DPO a low rate.
    from_pairs["arm"] = {"objective.name": "arm", "data.train": pairs, "objective.beta": 0.05, "optim.lr": 5e-4}
    from_pairs["dpo"] = {"objective.name": "dpo", "data.train": pairs, "optim.lr": 1e-4}
    train(study, {JUDGE: judge, **from_pairs})
    make_scored(study)
    make_labelled(study, data)
    scored, labelled = str(study.folder / "scored.jsonl"), str(study.folder / "labelled.jsonl")
    from_answers = {
        name: {"objective.name": name, "data.train": scored, "data.columns": [f"reward={column}"]}
        for name, column in (("rad", "share"), ("fudge", "score"), ("td_lambda", "score"), ("cd_q", "score"))
    }
    from_answers["ctl"] = {
        "objective.name": "ctl", "data.train": scored, "data.columns": ["reward=score"], "objective.n": SAMPLES,
        "batch_size": 2,
    }  # fmt: skip
    teacher = str(study.model("partial_bt", 0))
    from_answers["distill"] = {"objective.name": "distill", "data.train": pairs, "objective.teacher": teacher}
    from_answers["parm"] = {"objective.name": "parm", "data.train": labelled, "objective.beta": 0.05}
    train(study, from_answers)
    report(measure(study), given.results)


def study_from(arguments: Sequence[str] | None) -> tuple[Study, argparse.Namespace]:
    parser = study_parser(__doc__, "hh", "../shared/models/stories260k")
    parser.set_defaults(batch_size=30, seeds=1, results=RESULTS)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/")
    given = parser.parse_args(arguments)
    return open_study(given, "hh"), given


def train(study: Study, models: dict[str, dict[str, Any]]) -> None:
    usual = {"model.init": study.lm, "data.format": "hh", "max_length": 256, "optim.lr": 1e-3, "batch_size": 8}
    usual["pack"] = 256
    train_models(study, {name: {**usual, **options} for name, options in models.items()}, [0])


def make_prompts(study: Study, data: Path) -> None:
    """Short prompts of both splits."""
    for split, count in PROMPTS.items():
        with gzip.open(data / f"hh_helpful.{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in file))
        short = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT][: study.count(count)]
        write_rows(study.prompts(split), ({"id": str(n), "prompt": prompt} for n, prompt in enumerate(short)))


def make_scored(study: Study) -> None:
    """Answers of the language model with the rewards of the model of full answers, and these from 0 to 1 (`share`)."""
    options = {"method": "top_p", "top_p": 1.0, "n": SAMPLES, "seed": 100, "rm": [str(study.model("bt", 0))]}
    sampled = decode(study, "train", options, "samples.jsonl")
    rewards = np.array([answer.numbers["guide_reward"] for answer in sampled.answers])
    low, high = np.quantile(rewards, (0.02, 0.98))
    rows = (
        {
            "prompt": answer.prompt, "response": answer.response, "score": float(reward),
            "share": float(np.clip((reward - low) / (high - low), 0, 1)),
        }
        for answers in sampled.by_prompt.values()
        for answer in answers
        for reward in [answer.numbers["guide_reward"]]
    )  # fmt: skip
    write_rows(study.folder / "scored.jsonl", rows)


def make_labelled(study: Study, data: Path) -> None:
    """Pairs of both sets with a label for helpful and one for harmless; 0.5 for the one that nobody judged."""
    rows = []
    for name, labels in (("helpful", [1.0, 0.5]), ("harmless", [0.5, 1.0])):
        with gzip.open(data / f"hh_{name}.train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows += [json.loads(line) | {"labels": labels} for line in file]
    write_rows(study.folder / "labelled.jsonl", rows)


def measure(study: Study) -> dict[str, Setting]:
    """Decodes the test prompts with every method of `decode.py`, and has the judge read the answers."""
    judge = ScoringModel.load(str(study.model(JUDGE, 0)), "reward", batch_size=30)

    def judged(system: System) -> dict[str, float]:
        texts = {
            (answer.prompt, answer.response): judge.tokenise(answer.prompt, answer.response, closed=False)
            for answer in system.answers
        }
        rewards = dict(zip(texts, (float(each[0]) for each in judge.rewards(list(texts.values()))), strict=True))
        return means_by_prompt(system, lambda prompt, response: rewards[prompt, response])

    metrics = {"reward": judged, **{name: number_of(name) for name in ("kl", "lm_tokens", "rm_tokens", "seconds")}}
    found: dict[str, Setting] = {}
    for entry in ENTRIES:
        if entry.lm.startswith(STRONG) or entry.lm == WEAK:
            continue
        models = {name: str(study.model(name, 0)) for name in entry.trained} | {WEAK: study.lm}
        options = {"method": entry.method, **entry.options, "seed": 0, "format": "hh"}
        options |= {"rm": [models[name] for name in entry.models]} if entry.models else {}
        options |= {"lm": models[entry.lm]} if entry.lm else {}
        weight = entry.weights[len(entry.weights) // 2] if entry.weights else None
        options |= {} if weight is None else {"weight": [weight]}
        setting = found.setdefault(entry.name, {"entry": entry.name, "weight": weight})
        system = decode(study, "test", options, f"answers/{entry.name}.jsonl".replace(" ", "_"))
        add_numbers(setting, "test", system, metrics)
    return found


def report(found: dict[str, Setting], folder: Path) -> None:
    """Writes the numbers and the table."""
    every = {entry.name: entry for entry in ENTRIES}
    methods = table(
        ("method", "models", "weight", "judge's reward", "KL, nats", "LM tokens", "RM tokens", "ms"),
        [_row(every[name], setting) for name, setting in found.items()],
        texts=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps(summary(found), indent=1))
    write_whole(folder / "tables.md", methods)
    if folder == RESULTS:
        fill_page(PAGE, {"methods": methods})
    print(methods)


def _row(entry: Entry, setting: Setting) -> tuple[str, ...]:
    def of(metric: str, form: str = "{:.0f} ± {:.0f}", factor: float = 1.0) -> str:
        mean, error = estimate(setting[f"test {metric}"])
        return form.format(factor * mean, factor * error)

    models = ", ".join(entry.models).replace(WEAK, "the LM") or (f"decodes itself: {entry.lm}" if entry.lm else "-")
    return (
        f"{entry.method} {entry.label}".strip(), models, "-" if setting["weight"] is None else f"{setting['weight']:g}",
        of("reward", "{:.2f} ± {:.2f}"), of("kl", "{:.1f} ± {:.1f}"), of("lm_tokens"), of("rm_tokens"),
        of("seconds", "{:.0f} ± {:.0f}", 1000),
    )  # fmt: skip


if __name__ == "__main__":
    main()
