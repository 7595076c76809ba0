"""What the studies on stories share: prompts, how happy a story is, preference pairs, and models trained on them.

A language model opens many stories and samples several continuations of each. The mean VADER valence of their words
(Hutto and Gilbert, 2014) is the true reward, in units a tenth of a word's, so 1 is a valence of 0.1 a word. Two
continuations of one prompt make a pair, labelled by the Bradley-Terry model: `P(a is chosen) = sigmoid((v_a - v_b) /
LABEL_NOISE)`. Nothing else is known to the reward models.

With another language model (`--lm`), everything is made anew from its samples.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from pargs_jax.commands.generate import generate, open_session
from pargs_jax.commands.train import train
from pargs_jax.config import DecodeConfig, ModelConfig, OptimConfig, TrainConfig
from pargs_jax.config_files import from_mapping
from pargs_jax.decoding.methods import Method
from pargs_jax.durable_files import write_whole
from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import System, load_systems
from pargs_jax.evaluation.statistics import Estimate
from pargs_jax.generation.guidance import roles_of
from pargs_jax.generation.session import Session
from pargs_jax.mesh import start

LABEL_NOISE = 0.5
MAX_NEW_TOKENS = 64
K = 10
SAMPLES = 8
"""Continuations of each prompt that pairs are made of: half as many pairs."""
SPLITS = {"train": 1000, "eval": 100, "test": 200}
"""Prompts of each split. No prompt is in two of them."""

_NAMES = (
    "Lily", "Tom", "Ben", "Sara", "Tim", "Nora", "Max", "Anna", "Sam", "Lucy", "Jack", "Amy", "Leo", "Emma", "Bob",
    "Jane", "Spot", "Kim", "Dan", "Sue", "Molly", "Jim", "Ella", "Nick", "Zoe", "Fred", "Rose", "Paul", "Ruby",
    "Finn",
)  # fmt: skip
_WHO = (
    "boy", "girl", "dog", "cat", "bear", "bird", "rabbit", "mouse", "frog", "duck", "fish", "pig", "cow", "fox",
)  # fmt: skip
_SIZES = ("", "little ", "small ", "big ", "tall ", "young ")
_THINGS = (
    "box", "ball", "tree", "door", "stone", "bag", "hat", "book", "cup", "boat", "car", "drum", "leaf", "log",
    "rope",
)  # fmt: skip
_EVENTS = ("saw a {}", "found a {}", "looked at a {}", "sat near a {}", "had a {}")


@dataclasses.dataclass(frozen=True)
class Study:
    """Where a study works, and how: the options that all studies of stories have."""

    lm: str
    out: Path
    seeds: int
    dtype: str = "float32"
    batch_size: int = 100
    scale: float = 1.0
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """What only depends on the language model: prompts, pairs and reward models."""
        return self.out / "stories"

    def prompts(self, split: str) -> Path:
        """The file of a split's prompts."""
        return self.folder / f"prompts.{split}.jsonl"

    def pairs(self, split: str) -> Path:
        """The file of preference pairs, of the split `train` or `test`."""
        return self.folder / f"pairs.{split}.jsonl"

    def reward_model(self, objective: str, seed: int) -> Path:
        """The folder of a reward model."""
        return self.folder / f"{objective}-{seed}"


def study_from(arguments: Sequence[str] | None, description: str, name: str) -> tuple[Study, argparse.Namespace]:
    """Reads a study's command line, and starts its devices. Ends the process with one line if that is wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="../shared/models/stories260k", help="language model: a folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder for models and answers")
    parser.add_argument("--results", type=Path, default=Path("studies", name, "results"), help="folder for the results")
    parser.add_argument("--seeds", type=int, default=5, help="training runs of every reward model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=100, help="rows that are decoded together")
    parser.add_argument("--mesh", default="auto", help="as in train.py and decode.py")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the prompts; 0.02 checks that all of it runs"
    )
    parser.add_argument("--train", nargs="*", default=[], metavar="NAME=VALUE", help="more options of train.py")
    found = parser.parse_args(arguments)
    study = Study(found.lm, found.out, found.seeds, found.dtype, found.batch_size, found.scale, tuple(found.train))
    if found.lm.startswith((".", "/")) and not Path(found.lm).is_dir():
        sys.exit(f"--lm {found.lm}: is not there; give a folder or the hub id of a language model")
    start(DecodeConfig(mesh=found.mesh))
    return study, found


@lru_cache(maxsize=1)
def _lexicon() -> dict[str, float]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError("VADER is not installed; pip install 'pargs-jax[studies]'") from None
    return SentimentIntensityAnalyzer().lexicon


def valence(prompt: str, response: str) -> float:
    """Ten times the mean VADER valence of the response's words; a word that the lexicon lacks counts 0. The lexicon's
    valences go from -4 to 4. 0 for a response without words."""
    words = re.findall(r"[a-z']+", response.lower())
    return 10 * sum(_lexicon().get(word, 0.0) for word in words) / len(words) if words else 0.0


def polarity(prompt: str, response: str) -> float:
    """TextBlob's polarity of the response, from -1 to 1: another lexicon (De Smedt and Daelemans, 2012), with
    negations and intensifiers, averaged over the rated phrases. No model was trained on it."""
    try:
        from textblob import TextBlob
    except ImportError:
        raise InputError("TextBlob is not installed; pip install 'pargs-jax[studies]'") from None
    return float(TextBlob(response).sentiment.polarity)


@lru_cache(maxsize=1)
def _openings() -> dict[str, list[str]]:
    """All openings, dealt to the splits (80 %, 7 %, 13 %) by a hash of their text, in a random order."""
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, who, size, thing, event in itertools.product(_NAMES, _WHO, _SIZES, _THINGS, _EVENTS):
        text = f"Once upon a time, there was a {size}{who} named {name}. One day, {name} {event.format(thing)}."
        place = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 15
        found["train" if place < 12 else "eval" if place < 13 else "test"].append(text)
    for texts in found.values():
        random.Random(0).shuffle(texts)
    return found


def make_prompts(study: Study) -> None:
    """Writes the prompts of every split."""
    study.folder.mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        rows = [
            {"id": f"{split}-{i}", "prompt": text}
            for i, text in enumerate(_openings()[split][: max(8, round(study.scale * count))])
        ]
        write_whole(study.prompts(split), "".join(json.dumps(row) + "\n" for row in rows))


def make_pairs(study: Study) -> dict[str, float]:
    """Samples continuations and makes the pairs of them; returns what is to be said of them."""
    said = {}
    for number, split in enumerate(("train", "test")):
        samples = decode(
            study, split, {"method": "top_k", "k": K, "n": SAMPLES, "seed": 100 + number}, f"samples.{split}.jsonl"
        )
        chance = random.Random(number)
        rows, errors, differences = [], 0, []
        for answers in samples.by_prompt.values():
            for a, b in zip(answers[::2], answers[1::2], strict=True):
                difference = valence(a.prompt, a.response) - valence(b.prompt, b.response)
                first = chance.random() < 1 / (1 + math.exp(-difference / LABEL_NOISE))
                if difference == 0 or not (a.response and b.response):
                    continue
                errors += first != (difference > 0)
                differences.append(abs(difference))
                chosen, rejected = (a, b) if first else (b, a)
                rows.append({"prompt": a.prompt, "chosen": chosen.response, "rejected": rejected.response})
        write_whole(study.pairs(split), "".join(json.dumps(row) + "\n" for row in rows))
        said |= {
            f"{split}_pairs": len(rows),
            f"{split}_labels_against_the_valence": errors / len(rows),
            f"{split}_mean_difference": sum(differences) / len(rows),
        }
    return said


def train_reward_models(study: Study, settings: dict[str, dict]) -> None:
    """Trains a reward model for each objective and seed that is not there yet."""
    for seed in range(study.seeds):
        for objective, own in settings.items():
            folder = study.reward_model(objective, seed)
            if (folder / "model" / "model.safetensors").exists():
                continue
            config = TrainConfig(
                out=str(folder),
                seed=seed,
                resume=folder.exists(),
                batch_size=16,
                max_length=128,
                epochs=1.0,
                save_every=0,
                log_every=50,
                model=ModelConfig(init=study.lm),
                optim=OptimConfig(lr=1e-3),
            )
            options = {"data.train": str(study.pairs("train")), "objective.name": objective, **own}
            train(with_options(config, options | dict(word.split("=", 1) for word in study.options)))


def with_options(config: TrainConfig, options: dict) -> TrainConfig:
    """The config with options by their dotted names."""
    nested = dataclasses.asdict(config)
    for name, value in options.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place[part]
        place[last] = value
    return from_mapping(TrainConfig, nested, "--train")


class _Opened:
    """The session of the last models, which the next settings may need again."""

    def __init__(self) -> None:
        self.key: object = None
        self.session: Session | None = None

    def __call__(self, config: DecodeConfig, reward_models: Sequence[str | Path], method: Method) -> Session:
        sources = tuple(map(str, reward_models))
        key = (config.lm, sources, roles_of(method, sources), config.dtype)
        if key != self.key:
            self.key, self.session = key, open_session(config, reward_models, method)
        return self.session


_opened = _Opened()


def decode(study: Study, split: str, options: dict, file: str) -> System:
    """The answers to a split's prompts, decoded with options of `decode.py` unless they are there already."""
    out = study.folder / file
    config = {
        "lm": study.lm,
        "prompts": str(study.prompts(split)),
        "out": str(out),
        "max_new_tokens": MAX_NEW_TOKENS,
        "batch_size": study.batch_size,
        "dtype": study.dtype,
        **options,
    }
    generate(from_mapping(DecodeConfig, config, file), open_models=_opened)
    return load_systems([("", str(out))])[0]


def means_by_prompt(system: System, score: Callable[[str, str], float]) -> dict[str, float]:
    """Each prompt's mean score over its answers."""
    return {
        prompt: sum(score(answer.prompt, answer.response) for answer in answers) / len(answers)
        for prompt, answers in system.by_prompt.items()
    }


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values `[seeds][prompts]`. Its variance is that over prompts, of means over seeds, plus that over
    seeds, of means over prompts: the sum is at least the variance that both cause."""
    table = np.array(values, float)
    mean, error = Estimate.of(table.mean(axis=0))
    return Estimate(mean, float(np.hypot(error, Estimate.of(table.mean(axis=1))[1])) if len(table) > 1 else error)


def print_table(rows: Iterable[Sequence[str]], headings: Sequence[str]) -> str:
    """A table in Markdown, its numbers right-aligned."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def fill_page(page: Path, parts: dict[str, str]) -> None:
    """Replaces what stands between the comments `<!-- NAME -->` and `<!-- end -->` of a page."""
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        start, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (found and end):
            raise InputError(f"{page}: has no part '<!-- {name} -->' ... '<!-- end -->'")
        text = f"{start}{found}\n{content}\n{end}{after}"
    write_whole(page, text)
