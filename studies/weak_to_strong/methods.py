"""What the study of weak to strong runs: a model of every kind, every decoding method, and the data that the demo does
not have.

The oracle (`pargs_jax.demo.language`) is the true reward. Models train for one epoch on the demo's pairs, or on answers
like its own.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pargs_jax.demo import task
from studies.experiment import (
    MAX_NEW_TOKENS,
    Metrics,
    Setting,
    Study,
    add_numbers,
    best_on_eval,
    decode,
    means_by_prompt,
    number_of,
    write_rows,
)

PAIRS, ANSWERS = 3200, 1600
"""What models learn from; answers have rewards, or two labels."""
SPLITS = {"train": 200, "eval": 50, "test": 100}
"""Prompts of each split; those of `train` are sampled for `ctl`."""
SAMPLES = 8
"""Answers to each of these."""
WEAK = "weak LM"
"""Stands for the weak language model, which the reward models start from, among the models of an entry."""
STRONG = "strong_"
"""Begins the names of training runs that start from the strong language model, which is the one that decodes."""
METRICS: Metrics = {
    "reward": lambda system: means_by_prompt(system, task.oracle),
    **{name: number_of(name) for name in ("kl", "lm_tokens", "rm_tokens", "seconds")},
}


class Entry(NamedTuple):
    """A method as a study runs it.

    Attributes:
        method: its name in `decode.py`.
        models: the training runs that guide it, by name, or `WEAK`; `--rm` in this order.
        weights: the reward weights that it is tried at; empty for its own, or none.
        options: its other options.
        lm: what decodes: a training run, by name, or `WEAK`; the study's language model if empty.
        label: what tells it apart from other entries with these models.
    """

    method: str
    models: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    options: Mapping[str, Any] = {}
    lm: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """Its method, models and label."""
        parts = (self.method, *self.models, self.lm and f"by {self.lm}", self.label)
        return " ".join(part for part in parts if part)

    @property
    def trained(self) -> set[str]:
        """The training runs that it needs."""
        return {*self.models, self.lm} - {WEAK, ""}


ENTRIES = (
    Entry("greedy"),
    Entry("contrastive"),
    Entry("args", ("bt",), (0.5, 1.0, 2.0)),
    Entry("pargs_greedy", ("partial_bt",), (2.0, 4.0, 8.0)),
    Entry("transfer_q", ("dpo", "bt"), (), {"look_ahead": 5}),
    Entry("top_k"),
    Entry("top_p"),
    Entry("args_stochastic", ("bt",), (0.5, 1.0, 2.0), {"temperature": 1.0}),
    Entry("pargs", ("partial_bt",), (2.0, 4.0, 8.0)),
    Entry("rad", ("rad",), (10.0, 30.0, 50.0)),
    Entry("farma", ("farma",), (0.5, 1.0, 2.0)),
    Entry("farma", ("distill",), (2.0, 4.0, 8.0)),
    Entry("cd", ("fudge",), (0.5, 1.0, 2.0)),
    Entry("cd", ("cd_q",), (0.5, 1.0, 2.0)),
    Entry("cd", ("distill",), (2.0, 4.0, 8.0), {"k": 10}),
    Entry("vas", ("td_lambda",), (0.5, 1.0, 2.0)),
    Entry("genarm", ("arm",), (0.25, 0.5, 1.0)),
    Entry("parm", ("parm",), (0.5, 1.0, 2.0), {"preference": [0.5, 0.5]}),
    Entry("expert_ratio", ("dpo", WEAK), (0.25, 0.5, 1.0, 2.0)),
    *(Entry("best_of_n", ("partial_bt",), (), {"k": 10, "search": {"samples": n}}, label=f"n={n}") for n in (2, 4, 16)),
    Entry("speculative_rejection", ("partial_bt",), (), {"k": 10, "search": {"samples": 16, "chunk": 16}}),
    Entry("blockwise", ("partial_bt",), (), {"k": 10, "search": {"successors": 10, "chunk": 16}}),
    Entry("chunk_beam", ("partial_bt",), (), {"k": 10, "temperature": 1.0}),
    Entry("weak_to_strong", ("dpo", WEAK), (), {"k": 10, "temperature": 1.0}),
    Entry("cards", ("partial_bt",), (), {"k": 10, "temperature": 1.0}),
    Entry("smc", ("ctl",), (), {"search": {"particles": 10}}),
    Entry("top_k", lm=WEAK),
    Entry("top_k", lm="dpo"),
    Entry("top_k", lm=f"{STRONG}dpo"),
    Entry("top_k", lm=f"{STRONG}ppo"),
    Entry("top_k", lm=f"{STRONG}rloo"),
)
"""All methods of `decode.py`, and language models that are tuned and decode unguided."""


def models_of(study: Study, seed: int, weak_lm: str) -> dict[str, dict[str, Any]]:
    """A model of every kind, with its options of `train.py`."""
    scored, labelled, sampled = (str(study.folder / f"{name}.jsonl") for name in ("scored", "labelled", "sampled"))
    judge = str(study.model("partial_bt", seed))
    on_policy = {
        "model.init": study.lm, "objective.rm": judge, "objective.kl_weight": 0.2,
        "objective.max_new_tokens": MAX_NEW_TOKENS, "batch_size": 32, "steps": 40,
    }  # fmt: skip
    answers = {"data.train": scored, "data.columns": ["reward=true"]}
    own: dict[str, dict[str, Any]] = {
        "partial_bt": {},
        "bt": {},
        "arm": {},
        "dpo": {"optim.lr": 5e-5},
        "farma": {"optim.lr": 1e-3},
        "distill": {"objective.teacher": judge, "optim.lr": 1e-3},
        "rad": {"data.train": scored, "data.columns": ["reward=share"]},
        "fudge": answers,
        "td_lambda": answers,
        "cd_q": {**answers, "optim.lr": 1e-3},
        "ctl": {"data.train": sampled, "objective.n": SAMPLES, "batch_size": 2, "optim.lr": 1e-3},
        "parm": {"data.train": labelled, "objective.beta": 0.05, "optim.lr": 1e-2},
        f"{STRONG}dpo": {"model.init": study.lm, "optim.lr": 5e-5},
        f"{STRONG}ppo": {**on_policy, "optim.lr": 3e-4},
        f"{STRONG}rloo": {**on_policy, "optim.lr": 1e-3},
    }
    from_the_demo = {"data.train": "demo", "data.demo_pairs": study.count(PAIRS)}
    return {
        name: {
            "model.init": weak_lm, "objective.name": name.removeprefix(STRONG),
            **({} if "data.train" in options else from_the_demo), **options,
        }
        for name, options in own.items()
    }  # fmt: skip


def make_data(study: Study) -> None:
    """Writes the prompts of every split, and the data that the demo does not have: answers with their true rewards and
    these from 0 to 1 (`rad`), pairs with two labels (`parm`), and several samples of the language model to each prompt
    (`ctl`)."""
    for split, count in SPLITS.items():
        write_rows(study.prompts(split), task.prompts(count, seed=1, split=split)[: study.count(count)])
    count = study.count(ANSWERS)
    write_rows(study.folder / "scored.jsonl", map(_scored, task.sft_rows(count)))
    chance = random.Random(0)
    write_rows(study.folder / "labelled.jsonl", (_with_labels(row, chance) for row in task.preferences(count)))
    sampled = decode(study, "train", {"method": "top_p", "top_p": 1.0, "n": SAMPLES, "seed": 100}, "samples.jsonl")
    rows = (
        {"prompt": a.prompt, "response": a.response, "reward": task.oracle(a.prompt, a.response)}
        for answers in sampled.by_prompt.values()
        for a in answers
    )
    write_rows(study.folder / "sampled.jsonl", rows)


def _scored(row: Mapping[str, str]) -> dict[str, Any]:
    """An answer with its true reward, and with a share of the best one: 0 for an empty answer or a worse one."""
    reward = task.oracle(row["prompt"], row["chosen"])
    share = max(0.0, (reward + 5) / 13)
    return {"prompt": row["prompt"], "response": row["chosen"], "true": reward, "share": share}


def _with_labels(row: Mapping[str, str], chance: random.Random) -> dict[str, Any]:
    """A pair with a label for the tone of its answers, and one for the rest of the true reward; each is drawn by
    Bradley-Terry, and is 0.5 where there is no difference."""
    terms = [task.oracle_terms(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    tones = [each["kind"] + each["rude"] for each in terms]
    facts = [sum(each.values()) - tone for each, tone in zip(terms, tones, strict=True)]
    labels = []
    for a, b in (tones, facts):
        is_better = chance.random() < 1 / (1 + np.exp(-(a - b) / task.LABEL_TEMPERATURE))
        labels.append(0.5 if a == b else float(is_better))
    return {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "labels": labels}


def measure(study: Study, weak_lm: str, trained_always: Iterable[str]) -> dict[str, Setting]:
    """Decodes the test prompts with every entry and weight, and the eval prompts where there are several weights, with
    every training run of models that have several. Returns the numbers by `entry weight`."""
    found: dict[str, Setting] = {}
    for entry in ENTRIES:
        has_runs = entry.trained and entry.trained <= set(trained_always)
        for seed in range(study.seeds if has_runs else 1):
            models = {name: str(study.model(name, seed)) for name in entry.trained} | {WEAK: weak_lm}
            for weight in entry.weights or (None,):
                options = {"method": entry.method, **entry.options, "seed": seed}
                options |= {"rm": [models[name] for name in entry.models]} if entry.models else {}
                options |= {"lm": models[entry.lm]} if entry.lm else {}
                options |= {} if weight is None else {"weight": [weight]}
                name = entry.name if weight is None else f"{entry.name} w{weight:g}"
                setting = found.setdefault(name, {"entry": entry.name, "weight": weight})
                for split in ("eval", "test") if entry.weights else ("test",):
                    file = f"answers/{split}_{name}_{seed}.jsonl".replace(" ", "_")
                    metrics = METRICS if split == "test" else {"reward": METRICS["reward"]}
                    add_numbers(setting, split, decode(study, split, options, file), metrics)
    return found


def picked(found: Mapping[str, Setting]) -> dict[str, str]:
    """The setting of each entry: the weight with the highest true reward on the prompts of the eval split."""
    return {
        entry.name: best_on_eval({n: s for n, s in found.items() if s["entry"] == entry.name}, "reward")
        for entry in ENTRIES
    }
