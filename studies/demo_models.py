"""What the studies on the demo task share: its prompts, a model of every kind, and every decoding method.

The oracle (`pargs_jax.demo.language`) is the true reward. Models start from a language model of the task, and train for
one epoch on the demo's pairs or as many answers.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
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

PAIRS = 1600
SPLITS = {"train": 400, "eval": 100, "test": 200}
"""Prompts of each split; those of `train` are sampled for `ctl`."""
SAMPLES = 8
"""Answers to each of these."""
LM = "lm"
"""Stands for the language model that the reward models start from, among the models of an entry."""
METRICS: Metrics = {
    "reward": lambda system: means_by_prompt(system, task.oracle),
    **{name: number_of(name) for name in ("kl", "lm_tokens", "rm_tokens", "seconds")},
}

ON_EVAL: Metrics = {"reward": METRICS["reward"]}


class Entry(NamedTuple):
    """A method as a study runs it.

    Attributes:
        method: its name in `decode.py`.
        models: the training runs that guide it, by name, or `LM`; `--rm` in this order.
        weights: the reward weights that it is tried at; empty for its own, or none.
        options: its other options.
        lm: what decodes: a training run, by name, or `LM`; the study's language model if empty.
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


_TEN = {"search": {"samples": 10}, "k": 10}
EVERY_METHOD = (
    Entry("greedy"),
    Entry("contrastive"),
    Entry("args", ("bt",), (0.5, 1.0, 2.0)),
    Entry("pargs_greedy", ("partial_bt",), (2.0, 4.0, 8.0)),
    Entry("transfer_q", ("dpo", "bt"), (1.0,), {"look_ahead": 5}),
    Entry("top_k"),
    Entry("top_p"),
    Entry("args_stochastic", ("bt",), (0.5, 1.0, 2.0), {"temperature": 1.0}),
    Entry("pargs", ("partial_bt",), (2.0, 4.0, 8.0)),
    Entry("rad", ("rad",), (10.0, 30.0, 50.0)),
    Entry("farma", ("farma",), (0.5, 1.0, 2.0)),
    Entry("farma", ("distill",), (2.0, 4.0, 8.0)),
    Entry("cd", ("fudge",), (0.5, 1.0, 2.0, 4.0)),
    Entry("cd", ("cd_q",), (0.5, 1.0, 2.0, 4.0)),
    Entry("vas", ("td_lambda",), (0.5, 1.0, 2.0, 4.0)),
    Entry("genarm", ("arm",), (0.25, 0.5, 1.0)),
    Entry("parm", ("parm",), (0.5, 1.0, 2.0), {"preference": [0.5, 0.5]}),
    Entry("expert_ratio", ("dpo", LM), (1.0, 2.0, 4.0)),
    Entry("best_of_n", ("partial_bt",), (), _TEN),
    Entry("speculative_rejection", ("partial_bt",), (), {"k": 10, "search": {"samples": 10, "chunk": 16}}),
    Entry("blockwise", ("partial_bt",), (), {"k": 10, "search": {"successors": 10, "chunk": 16}}),
    Entry("chunk_beam", ("partial_bt",), (), {"k": 10, "temperature": 1.0}),
    Entry("weak_to_strong", ("dpo", LM), (), {"k": 10, "temperature": 1.0}),
    Entry("cards", ("partial_bt",), (), {"k": 10, "temperature": 1.0}),
    Entry("smc", ("ctl",), (), {"search": {"particles": 10}}),
    Entry("top_k", lm="dpo"),
    Entry("top_k", lm="ppo"),
    Entry("top_k", lm="rloo"),
)
"""All methods of `decode.py`, and the language models that DPO, PPO and RLOO tune, which decode unguided."""


def models_of(study: Study, seed: int, init: str, prefix: str = "") -> dict[str, dict[str, Any]]:
    """A model of every kind, by its name after the prefix, with its options of `train.py`. All start from the language
    model `init`, which has the demo's tokenizer and answers like it."""
    scored, tone_and_facts, sampled = (study.folder / f"{name}.jsonl" for name in ("scored", "labels", "sampled"))
    judge = str(study.model(f"{prefix}partial_bt", seed))
    own: dict[str, dict[str, Any]] = {
        "partial_bt": {},
        "bt": {},
        "arm": {},
        "farma": {"optim.lr": 1e-3},
        "distill": {"objective.teacher": judge, "optim.lr": 1e-3},
        "rad": {"data.train": str(scored)},
        "fudge": {},
        "td_lambda": {},
        "cd_q": {"optim.lr": 1e-3},
        "ctl": {"data.train": str(sampled), "objective.n": SAMPLES, "batch_size": 2, "optim.lr": 1e-3},
        "parm": {"data.train": str(tone_and_facts), "objective.beta": 0.5, "optim.lr": 1e-2},
        "dpo": {"optim.lr": 5e-4},
        **{
            name: {
                "objective.rm": judge, "objective.kl_weight": 0.2, "objective.max_new_tokens": MAX_NEW_TOKENS,
                "batch_size": 32, "steps": 40, "optim.lr": 3e-4,
            }
            for name in ("ppo", "rloo")
        },
    }  # fmt: skip
    from_the_demo = {"data.train": "demo", "data.demo_pairs": study.count(PAIRS)}
    return {
        f"{prefix}{name}": {
            "model.init": init, "objective.name": name, **({} if "data.train" in options else from_the_demo), **options
        }
        for name, options in own.items()
    }  # fmt: skip


def make_data(study: Study, lm: str) -> None:
    """Writes the prompts of every split, and the data that the demo does not have: rewards from 0 to 1 (`rad`), pairs
    with two labels (`parm`), and several scored samples of the language model to each prompt (`ctl`)."""
    for split, count in SPLITS.items():
        write_rows(study.prompts(split), task.prompts(count, seed=1, split=split)[: study.count(count)])
    pairs = study.count(PAIRS)
    answers = task.sft_rows(pairs)
    write_rows(
        study.folder / "scored.jsonl",
        ({"prompt": r["prompt"], "response": r["chosen"], "reward": from_0_to_1(r)} for r in answers),
    )
    chance = random.Random(0)
    write_rows(study.folder / "labels.jsonl", (_with_labels(row, chance) for row in task.preferences(pairs)))
    options = {"method": "top_p", "top_p": 1.0, "n": SAMPLES, "lm": lm, "seed": 100}
    sampled = decode(study, "train", options, "samples.train.jsonl")
    write_rows(
        study.folder / "sampled.jsonl",
        (
            {"prompt": a.prompt, "response": a.response, "reward": task.oracle(a.prompt, a.response)}
            for answers in sampled.by_prompt.values()
            for a in answers
        ),
    )


def from_0_to_1(row: Mapping[str, str]) -> float:
    """The true reward of a row's answer, scaled so that an empty answer has 0 and the best has 1; below 0 it is 0."""
    return max(0.0, (task.oracle(row["prompt"], row["chosen"]) + 5) / 13)


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


def measure(study: Study, entries: Iterable[Entry], seeds: Sequence[int], init: str, folder: str) -> dict[str, Setting]:
    """Decodes the test prompts with every entry, weight and training run, and the eval prompts where there are several
    weights, into a folder of the study. Returns the numbers by `entry weight`. `init` is what `LM` stands for."""
    found: dict[str, Setting] = {}
    for entry in entries:
        is_trained = bool({*entry.models, entry.lm} - {LM, ""})
        for seed in seeds if is_trained else seeds[:1]:
            for weight in entry.weights or (None,):
                options = {"method": entry.method, **entry.options, "seed": seed}
                models = {name: str(study.model(name, seed)) for name in (*entry.models, entry.lm)} | {LM: init}
                if entry.models:
                    options["rm"] = [models[name] for name in entry.models]
                if entry.lm:
                    options["lm"] = models[entry.lm]
                if weight is not None:
                    options["weight"] = [weight]
                name = entry.name if weight is None else f"{entry.name} w{weight:g}"
                setting = found.setdefault(name, {"entry": entry.name, "weight": weight})
                for split in ("eval", "test") if len(entry.weights) > 1 else ("test",):
                    file = f"{folder}/{split}_{name}_{seed}.jsonl".replace(" ", "_")
                    system = decode(study, split, options, file)
                    add_numbers(setting, split, system, METRICS if split == "test" else ON_EVAL)
    return found


def picked(found: Mapping[str, Setting], entries: Iterable[Entry]) -> dict[str, str]:
    """The setting of each entry: the weight with the highest true reward on the prompts of the eval split."""
    return {
        entry.name: best_on_eval({n: s for n, s in found.items() if s["entry"] == entry.name}, "reward")
        for entry in entries
    }
