"""What the studies on stories share: prompts, how happy a story is, preference pairs, and models trained on them.

A language model opens many stories and samples several continuations of each. The mean VADER valence of their words
(Hutto and Gilbert, 2014) is the true reward, in units a tenth of a word's, so 1 is a valence of 0.1 a word. Two
continuations of one prompt make a pair, labelled by the Bradley-Terry model: `P(a is chosen) = sigmoid((v_a - v_b) /
LABEL_NOISE)`. Nothing else is known to the reward models.

With another language model (`--lm`), everything is made anew from its samples.
"""

import argparse
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pargs_jax.errors import InputError
from pargs_jax.evaluation.answers import GivenAnswer, System
from studies.experiment import Study, decode, open_study, study_parser, train_models, write_rows

LABEL_NOISE = 0.5
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


def study_from(
    arguments: Sequence[str] | None, description: str, name: str, **defaults: Any
) -> tuple[Study, argparse.Namespace]:
    """Reads a study's command line, and starts its devices. `defaults` are those of its options that it does not share
    with the other studies. Ends the process with one line if the command line is wrong."""
    parser = study_parser(description, name, "../shared/models/stories260k")
    parser.set_defaults(**defaults)
    given = parser.parse_args(arguments)
    return open_study(given, "stories"), given


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
    for split, count in SPLITS.items():
        openings = _openings()[split][: study.count(count)]
        write_rows(study.prompts(split), ({"id": f"{split}-{i}", "prompt": text} for i, text in enumerate(openings)))


class Labelled(NamedTuple):
    """Two continuations of a prompt, and which of them is chosen. `difference` is that of their true rewards."""

    first: GivenAnswer
    second: GivenAnswer
    difference: float
    first_is_chosen: bool

    @property
    def row(self) -> dict[str, str]:
        """The pair as a row of preferences."""
        chosen, rejected = (self.first, self.second) if self.first_is_chosen else (self.second, self.first)
        return {"prompt": self.first.prompt, "chosen": chosen.response, "rejected": rejected.response}


def sample(study: Study, split: str) -> System:
    """`SAMPLES` continuations of each prompt of the split `train` or `test`, for pairs."""
    seed = 100 + ("train", "test").index(split)
    return decode(study, split, {"method": "top_k", "k": K, "n": SAMPLES, "seed": seed}, f"samples.{split}.jsonl")


def label(samples: System, score: Callable[[str, str], float], seed: int, noise: float = LABEL_NOISE) -> list[Labelled]:
    """Pairs of continuations, none of which is in two, labelled by their scores with the noise of Bradley-Terry."""
    chance = random.Random(seed)
    pairs = []
    for answers in samples.by_prompt.values():
        for a, b in zip(answers[::2], answers[1::2], strict=True):
            difference = score(a.prompt, a.response) - score(b.prompt, b.response)
            pairs.append(Labelled(a, b, difference, chance.random() < 1 / (1 + math.exp(-difference / noise))))
    return pairs


def informative(pairs: Sequence[Labelled]) -> list[Labelled]:
    """The pairs whose continuations differ in their true rewards, and of which none is empty."""
    return [pair for pair in pairs if pair.difference and pair.first.response and pair.second.response]


def make_pairs(study: Study) -> dict[str, float]:
    """Samples continuations and makes the pairs of them; returns what is to be said of them."""
    said = {}
    for number, split in enumerate(("train", "test")):
        pairs = informative(label(sample(study, split), valence, number))
        write_rows(study.pairs(split), (pair.row for pair in pairs))
        said |= {
            f"{split}_pairs": len(pairs),
            f"{split}_labels_against_the_valence": share_of_wrong_labels(pairs),
            f"{split}_mean_difference": sum(abs(pair.difference) for pair in pairs) / len(pairs),
        }
    return said


def share_of_wrong_labels(pairs: Sequence[Labelled]) -> float:
    """How often the noise chose the continuation with the lower true reward."""
    return sum(pair.first_is_chosen != (pair.difference > 0) for pair in pairs) / len(pairs)


def train_reward_models(study: Study, models: Mapping[str, Mapping[str, Any]]) -> None:
    """Trains a reward model for each name and seed that is not there yet. The name is that of the objective, and the
    pairs are those of `make_pairs`, unless a model's own options say otherwise."""
    shared = {"model.init": study.lm, "batch_size": 16, "max_length": 128, "epochs": 1.0, "optim.lr": 1e-3}
    train_models(
        study,
        {
            name: {**shared, "data.train": str(study.pairs("train")), "objective.name": name, **own}
            for name, own in models.items()
        },
    )
