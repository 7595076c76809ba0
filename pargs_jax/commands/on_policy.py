"""What `train.py` needs besides for objectives on the model's own answers: a reward model, prompts, and the sampler."""

import numpy as np
from rich.console import Console

from pargs_jax.commands.demo import demo_reward_model, demo_training_prompts
from pargs_jax.config import TrainConfig
from pargs_jax.data.examples import Example
from pargs_jax.data.preferences import load_prompts
from pargs_jax.data_config import DEMO, column_names
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel
from pargs_jax.generation.rollouts import Rollouts
from pargs_jax.models.hf import stored_head
from pargs_jax.text.prompts import get_form
from pargs_jax.text.tokenization import TextTokenizer


def check_on_policy(config: TrainConfig) -> None:
    """Raises InputError for options that do not go with an objective on the model's own answers. Loads nothing but
    config.json of the reward model."""
    name, loss = config.objective.name, config.objective.loss
    if config.batch_size % loss.answers_per_prompt:
        raise InputError(
            f"--batch-size: got {config.batch_size}, must be a multiple of the {loss.answers_per_prompt} answers to a "
            "prompt (--objective.n)"
        )
    if config.model.dropout:
        raise InputError(
            f"--model.dropout: got {config.model.dropout:g}, must be 0 for {name}, which compares probabilities before "
            "and after an update"
        )
    if config.data.held_out:
        raise InputError(
            f"--data.held-out: got {config.data.held_out:g}, but {name} reads prompts; give some to evaluate on as "
            "--data.eval"
        )
    if config.data.prefix_tokenizer is not None:
        raise InputError(f"--data.prefix-tokenizer: has no effect on {name}, which compares no prefixes; leave it out")
    source = _reward_model_source(config)
    head = stored_head(source)
    if head not in ("reward", None):
        raise InputError(
            f"--objective.rm: {source} has a {head} head, must be a reward model of whole answers, with a scalar head"
        )


def load_scorer(config: TrainConfig, tokenizer: TextTokenizer, vocab_size: int) -> RewardModel:
    """The reward model that scores answers of a language model with this tokenizer and number of tokens."""
    return RewardModel.load(_reward_model_source(config), tokenizer, vocab_size, dtype=config.dtype, unroll=False)


def prepare_rollouts(
    config: TrainConfig, tokenizer: TextTokenizer, scorer: RewardModel, console: Console
) -> tuple[list[Example], list[Example] | None, Rollouts]:
    """The prompts to train on, those to evaluate on, and the sampler that answers both."""
    loss, own_prompts = config.objective.loss, {}
    sources = {"train": config.data.train, "eval": config.data.eval or (DEMO if config.data.train == DEMO else None)}
    examples = {
        split: None if source is None else _read_prompts(config, source, split, tokenizer, scorer, own_prompts, console)
        for split, source in sources.items()
    }
    sampler = Rollouts(tokenizer, scorer, own_prompts, config.dtype, loss.temperature, loss.max_new_tokens)
    return examples["train"], examples["eval"], sampler


def _reward_model_source(config: TrainConfig) -> str:
    if config.objective.rm is not None:
        return config.objective.rm
    if config.data.train != DEMO:
        raise InputError(f"--objective.rm: is missing; {config.objective.name} needs a reward model, give its folder")
    return str(demo_reward_model(METHODS["pargs"]))


def _read_prompts(
    config: TrainConfig,
    source: str,
    split: str,
    tokenizer: TextTokenizer,
    scorer: RewardModel,
    own_prompts: dict[bytes, list[int]],
    console: Console,
) -> list[Example]:
    """Tokenises a set of prompts for the policy and, into `own_prompts`, for the reward model. Prompts that leave no
    place for an answer are left out and counted."""
    if source == DEMO:
        prompts = demo_training_prompts(config, split)
    else:
        columns = column_names(config.data.columns, "--data.columns")
        prompts = load_prompts(source, get_form(config.data.format), tokenizer, split=split, columns=columns)
    new_tokens = config.objective.loss.max_new_tokens
    most = config.max_length - new_tokens
    examples = []
    for prompt in prompts:
        ids = tokenizer.encode_prompt(prompt.text)
        if len(ids) <= most:
            own = scorer.encode_prompt(prompt, ids)
            scorer.check_prompt(prompt, own, new_tokens)
            examples.append(Example(np.asarray(ids, np.int32), ()))
            own_prompts[examples[-1].prompt.tobytes()] = own
    if not examples:
        raise InputError(
            f"{source}: none of its {len(prompts)} prompts has at most {most} tokens: --max-length {config.max_length} "
            f"less --objective.max-new-tokens {new_tokens}"
        )
    left_out = len(prompts) - len(examples)
    console.print(
        f"{source} ({split}): {len(examples)} prompts; {left_out} longer than {most} tokens left out", highlight=False
    )
    return examples
