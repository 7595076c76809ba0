"""What decoding is asked for, and the batches that prompts are decoded in."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from pargs_jax.data.preferences import Prompt
from pargs_jax.decoding.guides import Prompts
from pargs_jax.decoding.methods import METHODS, Method
from pargs_jax.decoding.state import RowSettings
from pargs_jax.errors import InputError
from pargs_jax.generation.reward_models import RewardModel, left_pad, padded_width
from pargs_jax.models.causal import CausalModel
from pargs_jax.sharding import current_mesh, row_shards
from pargs_jax.text.tokenization import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: a method, and what differs from its defaults.

    `n` is the number of answers to each prompt. `trace` says what is recorded of every token: its own numbers, or all
    candidates with theirs. Raises InputError for a number that means nothing to the method.
    """

    method: Method
    weights: tuple[float, ...] = ()
    k: int | None = None
    temperature: float | None = None
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0
    n: int = 1
    trace: Literal["tokens", "candidates"] | None = None

    def __post_init__(self) -> None:
        given = {"k": self.k is not None, "weight": bool(self.weights), "temperature": self.temperature is not None}
        for name, reason in self.method.unused.items():
            if given[name]:
                raise InputError(f"{name}: means nothing to {self.method.source}, which {reason}; leave it out")
        if self.n > 1 and not self.samples:
            raise InputError(
                f"n: {self.n} answers of {self.method.source}, which does not sample, would be the same; leave it out"
            )

    @property
    def samples(self) -> bool:
        """Whether the method draws tokens at random."""
        return "temperature" not in self.method.unused

    @property
    def method_name(self) -> str:
        """The method's name in `METHODS`; for one that is not there, its source."""
        return next((name for name, method in METHODS.items() if method == self.method), self.method.source)

    @property
    def candidates(self) -> int:
        """The most candidates of a step."""
        return self.k or self.method.k

    @property
    def sampling_temperature(self) -> float:
        return self.method.temperature if self.temperature is None else self.temperature

    def reward_weights(self, reward_models: int) -> tuple[float, ...]:
        """The weight of each of so many reward models; none for a method without guidance. Raises InputError if there
        are not as many weights as reward models, or no reward models to guide it."""
        if not self.method.guided:
            return ()
        weights = self.weights or (self.method.weight,)
        if not reward_models:
            raise InputError("a guided method needs a reward model")
        if len(weights) not in (1, reward_models):
            raise InputError(f"{len(weights)} weights for {reward_models} reward models; give one, or one for each")
        return weights * reward_models if len(weights) == 1 else weights

    def of_rows(self, rows: int, reward_models: int) -> RowSettings:
        """These settings for each of so many rows. Raises InputError as `reward_weights` does."""
        return RowSettings.alike(
            rows,
            weights=self.reward_weights(reward_models),
            temperature=self.sampling_temperature,
            candidates=self.candidates,
            max_new_tokens=self.max_new_tokens,
        )


class Batch(NamedTuple):
    """Answers that are made together. Row b answers `prompts[b]` for the `samples[b]`-th time; rows beyond these fill
    up the mesh."""

    prompts: list[Prompt]
    samples: list[int]
    lm_ids: list[list[int]]
    lm_prompts: Prompts
    own_prompts: list[Prompts]
    """The same in the tokens of each reward model."""


def plan_batches(
    lm: CausalModel,
    tokenizer: TextTokenizer,
    reward_models: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    settings: Settings,
    answered: Bool[np.ndarray, "P n"] | None = None,
) -> Iterator[Batch]:
    """The prompts in batches, shortest first, so that few rows are padded to much more than their length.

    Args:
        lm, tokenizer: the language model and its tokenizer.
        reward_models: the reward models.
        prompts, settings: what to answer, and how.
        answered: which samples of each prompt there are already; these are left out.

    Raises:
        InputError: before the first batch, if a prompt does not fit a model together with its answer.
    """
    encoded = [tokenizer.encode_prompt(prompt.text) for prompt in prompts]
    own_encoded = [list(map(model.encode_prompt, prompts, encoded)) for model in reward_models]
    _check_lengths(lm, reward_models, prompts, encoded, own_encoded, settings.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    wanted = [(i, sample) for i in order for sample in range(settings.n) if answered is None or not answered[i][sample]]
    shards = row_shards(current_mesh())
    rows = -(-max(1, min(settings.batch_size, len(wanted))) // shards) * shards
    for first in range(0, len(wanted), rows):
        chosen = wanted[first : first + rows]
        lm_ids = [encoded[i] for i, _ in chosen]
        yield Batch(
            [prompts[i] for i, _ in chosen],
            [sample for _, sample in chosen],
            lm_ids,
            left_pad(lm_ids, rows, padded_width(max(map(len, lm_ids)))),
            [
                model.pad_prompts([own[i] for i, _ in chosen], rows)
                for model, own in zip(reward_models, own_encoded, strict=True)
            ],
        )


def _check_lengths(
    lm: CausalModel,
    reward_models: Sequence[RewardModel],
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    own_encoded: Sequence[Sequence[list[int]]],
    max_new_tokens: int,
) -> None:
    positions = lm.config.max_positions
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + max_new_tokens > positions:
            raise InputError(
                f"prompt {prompt.id!r} has {len(ids)} tokens; with {max_new_tokens} new tokens that is more "
                f"than the language model's context of {positions} tokens"
            )
        if ids and max(ids) >= lm.config.vocab_size:
            raise InputError(f"prompt {prompt.id!r} has tokens that the language model does not know")
    for model, own in zip(reward_models, own_encoded, strict=True):
        for prompt, ids in zip(prompts, own, strict=True):
            model.check_prompt(prompt, ids, max_new_tokens)
