"""What the word `demo` means in the options: the built-in task's language model, reward models, pairs and prompts."""

from pathlib import Path

from pargs_jax.config import DEMO, DecodeConfig, TrainConfig
from pargs_jax.data.preferences import Preference, Prompt
from pargs_jax.decoding.methods import Method
from pargs_jax.demo import task
from pargs_jax.errors import InputError

HELD_OUT_PAIRS = 256
"""Pairs of the evaluation split."""
PROMPTS = 200
"""Prompts that are answered where `--limit` gives no number."""
REWARD_MODELS = {"partial": Path("runs/partial_bt"), "full": Path("runs/bt")}
"""Where `train.py` leaves the demo's reward models, trained on all prefixes and on full answers."""


def model_source(source: str) -> str:
    """The folder or hub id of a model that an option names."""
    return str(task.DEMO_LM) if source == DEMO else source


def demo_pairs(config: TrainConfig, split: str) -> list[Preference]:
    """The pairs of a split, "train" or "eval"; prompts with good answers, for objectives that read no others."""
    size = config.data.demo_pairs if split == "train" else HELD_OUT_PAIRS
    make = task.sft_rows if config.objective.loss.answers == 1 else task.preferences
    return [Preference(**{"rejected": None, **row}) for row in make(size, seed=config.seed, split=split)]


def demo_reward_model(method: Method) -> Path:
    """The reward model of a guided method. Raises InputError if it was not trained yet."""
    if method.reward_model not in REWARD_MODELS:
        raise InputError(f"{method.source}: the demo has no reward model for it; give --rm")
    path = REWARD_MODELS[method.reward_model]
    if not path.exists():
        objective = {"partial": "", "full": " --objective.name bt"}[method.reward_model]
        raise InputError(f"{path}: the demo's reward model is missing; run 'python train.py{objective}' first")
    return path


def demo_prompts(config: DecodeConfig) -> list[Prompt]:
    """Prompts of the test split, which no demo model was trained on."""
    rows = task.prompts(config.limit or PROMPTS, seed=config.seed, split="test")
    return [Prompt(row["id"], row["prompt"]) for row in rows]
