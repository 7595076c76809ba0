"""What the word `demo` means in the options: the built-in task's language model, reward models, pairs and prompts."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from pargs_jax.config import DecodeConfig, TrainConfig
from pargs_jax.data.preferences import Preference, Prompt
from pargs_jax.data_config import DEMO
from pargs_jax.decoding.methods import Method
from pargs_jax.demo import task
from pargs_jax.errors import InputError
from pargs_jax.evaluation.statistics import Estimate
from pargs_jax.generation.answers import Answer

HELD_OUT_PAIRS = 256
"""Pairs of the evaluation split."""
PROMPTS = 200
"""Prompts that are answered where `--limit` gives no number."""
REWARD_MODELS = {"partial": Path("runs/partial_bt"), "full": Path("runs/bt"), "autoregressive": Path("runs/arm")}
"""Where `train.py` leaves the demo's reward models, by what methods need: trained on all prefixes, on full answers, and
as language models whose log-probabilities are the rewards."""


def model_source(source: str) -> str:
    """The folder or hub id of a model that an option names."""
    return str(task.DEMO_LM) if source == DEMO else source


def demo_pairs(config: TrainConfig, split: str) -> list[Preference]:
    """The pairs of a split, "train" or "eval"; prompts with single answers, for objectives that read no others, and
    with the oracle's rewards for those that read rewards. Raises InputError for an objective that needs labels."""
    size = config.data.demo_pairs if split == "train" else HELD_OUT_PAIRS
    make = task.sft_rows if config.objective.loss.answers == 1 else task.preferences
    rows = [Preference(**{"rejected": None, **row}) for row in make(size, seed=config.seed, split=split)]
    if config.objective.loss.reward_range is None:
        return rows
    if math.isfinite(config.objective.loss.reward_range[1]):
        raise InputError(f"{DEMO}: its rewards are not labels from 0 to 1; give a file with --data.train")
    return [dataclasses.replace(row, reward=task.oracle(row.prompt, row.chosen)) for row in rows]


def demo_training_prompts(config: TrainConfig, split: str) -> list[Prompt]:
    """The prompts of a split, "train" or "eval", for objectives that sample answers."""
    size = config.data.demo_pairs if split == "train" else HELD_OUT_PAIRS
    return [Prompt(row["id"], row["prompt"]) for row in task.prompts(size, seed=config.seed, split=split)]


def demo_reward_model(method: Method) -> Path:
    """The reward model of a guided method. Raises InputError if it was not trained yet."""
    if method.reward_model not in REWARD_MODELS:
        raise InputError(f"{method.source}: the demo has no reward model for it; give --rm")
    path = REWARD_MODELS[method.reward_model]
    if not path.exists():
        objective = "" if method.reward_model == "partial" else f" --objective.name {path.name}"
        raise InputError(f"{path}: the demo's reward model is missing; run 'python train.py{objective}' first")
    return path


def true_reward(answer: Answer) -> float:
    """The oracle's reward of an answer to one of the demo's prompts."""
    return task.oracle(answer.prompt, answer.response)


def judged_by_oracle(answers: Sequence[Answer]) -> str:
    """What the oracle says of some answers, with their KL and speed, in one line."""
    reward = Estimate.of(list(map(true_reward, answers)))
    kl = sum(answer.kl for answer in answers) / len(answers)
    speed = sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)
    shown = reward if len(answers) > 1 else f"{reward.mean:.2f}"
    return f"{len(answers)} answers: true reward {shown}, KL {kl:.1f} nats, {speed:,.0f} tokens/s"


def demo_prompts(config: DecodeConfig) -> list[Prompt]:
    """Prompts of the test split, which no demo model was trained on."""
    rows = task.prompts(config.limit or PROMPTS, seed=config.seed, split="test")
    return [Prompt(row["id"], row["prompt"]) for row in rows]
