"""What a step makes small: a model with a loss on batches."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.config import ObjectiveConfig
from pargs_jax.data.batches import Batch
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.model import Params
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.objectives import (
    FRACTIONS,
    Metrics,
    Prefixes,
    answer_likelihood,
    bradley_terry,
    choose_prefixes,
    partial_bradley_terry,
    prefix_lengths,
    prefix_loss,
    prefix_metrics,
    rewards_at,
)

LENGTH_GROUPS = 4
"""Widths that an encoder's prefixes are padded to in one step; each is a program of its own to compile."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model with a loss on batches. Static and hashable.

    `dtype` is what matrix products compute in; `closing_id` is the token that closes a text, which encoders need to
    read a prefix as a finished text.
    """

    model: CausalModel | PrefixCausalModel | EncoderModel
    config: ObjectiveConfig
    dtype: str = "float32"
    closing_id: int | None = None

    def __call__(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, ""]]]:
        """The loss, its metrics, and the weight of the batch in a mean over batches (pairs, or answer tokens)."""
        dropout_key, sample_key = (None, None) if key is None else jax.random.split(key)
        params = self.cast(params)
        if self.config.name == "sft":
            hidden = answer_states(self.model, params, batch, dropout_key, before=1)[:, 0]
            logits = self.model.logits(params, hidden)
            answers, lengths = batch.answers[:, 0], batch.answer_lengths[:, 0]
            loss, metrics = answer_likelihood(logits, answers, lengths, batch.weights)
            return loss, (metrics, (lengths * batch.weights).sum())
        if isinstance(self.model, EncoderModel):
            loss, metrics = self._encoder_loss(params, batch, dropout_key, sample_key)
            return loss, (metrics, batch.weights.sum())
        rewards = self.model.rewards(params, answer_states(self.model, params, batch, dropout_key))
        if self.config.name == "bt":
            loss, metrics = bradley_terry(rewards, batch.answer_lengths, batch.weights, **self._shape)
        else:
            options = self._prefixes(sample_key) | self._shape
            options["prefix_weights"] = options.pop("weighting")
            loss, metrics = partial_bradley_terry(rewards, batch.answer_lengths, batch.weights, **options)
        return loss, (metrics, batch.weights.sum())

    @property
    def loss_of_chance(self) -> float:
        """The loss of a model that tells nothing apart: of answers, or of tokens."""
        return math.log(self.model.config.vocab_size if self.config.name == "sft" else 2)

    def cast(self, params: Params) -> Params:
        """The parameters as matrix products use them; a reward head stays as it is (rewards are fp32)."""
        keeps_head = self.config.name != "sft"
        return {
            part: arrays if part == "head" and keeps_head else jax.tree.map(lambda x: x.astype(self.dtype), arrays)
            for part, arrays in params.items()
        }

    @property
    def _shape(self) -> dict[str, float]:
        return {"margin": self.config.margin, "centring": self.config.centring}

    def _prefixes(self, sample_key: PRNGKeyArray | None) -> dict[str, Any]:
        """Which prefixes count; without a key (evaluation) none is left out by chance."""
        return {
            "weighting": self.config.prefix_weights,
            "stride": self.config.stride,
            "sample": None if sample_key is None else self.config.sample,
            "minimum_length": self.config.minimum_length,
            "key": sample_key,
        }

    def _encoder_loss(
        self, params: Params, batch: Batch, dropout_key: PRNGKeyArray | None, sample_key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a model that reads every prefix as a text of its own, and so only those that are asked for.

        Metrics are of prefixes that were read. Evaluation (without a key) reads those at `FRACTIONS` besides the
        loss's, if these are not all. A training step reads no others: it has the metrics at all `FRACTIONS` if the
        loss is of every prefix, those of full answers if the loss surely includes these, and none if prefixes are
        drawn.
        """
        longest = batch.prefix_counts.max(axis=1)
        is_partial = self.config.name == "partial_bt"
        is_evaluation = sample_key is None
        has_all = is_partial and self.config.stride == 1 and self.config.minimum_length == 1
        draws = is_partial and self.config.sample is not None and not is_evaluation
        if is_partial:
            prefixes = choose_prefixes(batch.prefix_counts, batch.most_prefixes, **self._prefixes(sample_key))
        else:
            prefixes = Prefixes(longest[:, None], jnp.ones((len(longest), 1)))
        read = partial(encoder_rewards, self.model, params, batch, closing_id=self.closing_id, chunk=self.config.chunk)
        pairs = read(prefixes.lengths, descending=is_partial, key=dropout_key)
        loss = prefix_loss(pairs, prefixes, batch.weights, **self._shape)
        if draws:
            return loss, {}
        if is_evaluation and not has_all:
            others = read(prefix_lengths(longest, FRACTIONS[:-1]))
            reported = jnp.concatenate([others, rewards_at(pairs, prefixes, longest[:, None])], axis=1)
            return loss, prefix_metrics(reported, batch.weights)
        fractions = FRACTIONS if has_all else FRACTIONS[-1:]
        reported = rewards_at(pairs, prefixes, prefix_lengths(longest, fractions))
        return loss, prefix_metrics(reported, batch.weights, fractions)


def answer_states(
    model: CausalModel | PrefixCausalModel,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None = None,
    *,
    before: int = 0,
) -> Float[Array, "B A R D"]:
    """Final hidden states at the answers' tokens, all in one pass; `before=1` gives those one token earlier, which
    predict the answers' tokens."""
    rows, answers, width = batch.answers.shape
    prompt_width = batch.prompts.shape[1]
    start = jnp.repeat(prompt_width - batch.prompt_lengths, answers)
    hidden = model.encode(params, _texts(batch, width), start, key, prompt_width=prompt_width)
    first = prompt_width - before
    return hidden[:, first : first + width].reshape(rows, answers, width, -1)


def encoder_rewards(
    model: EncoderModel,
    params: Params,
    batch: Batch,
    prefixes: Int[Array, "B N"],
    *,
    closing_id: int,
    chunk: int = 8,
    descending: bool = False,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B N 2"]:
    """Rewards of prefixes of both answers, each prefix read as a finished text (`EncoderModel.answer_rewards`).

    Prefixes are mapped by `vmap`, `chunk` of them at a time (2 B chunk texts), and nothing but rewards is kept for the
    backward pass, which reads each chunk again: memory is that of one chunk.

    Args:
        model, params: an encoder with a reward head.
        batch: pairs of answers.
        prefixes: lengths in tokens, at least 1; a shorter answer stays at its last.
        closing_id: the token that closes a text, and that complete answers end in.
        chunk: prefixes read together.
        descending: each row's prefixes grow shorter, no two alike: later ones are then read at smaller widths.
        key: turns dropout on.
    """
    count, width = prefixes.shape[1], batch.answers.shape[-1]
    prompts, prompt_lengths = (jnp.repeat(x, 2, axis=0) for x in (batch.prompts, batch.prompt_lengths))
    descending = descending and batch.prefixes is None

    def group_rewards(first: int, last: int) -> Float[Array, "N B 2"]:
        room = width - first if descending else width

        @jax.checkpoint
        def one(prefix_and_key: tuple[Int[Array, "B"], PRNGKeyArray | None]) -> Float[Array, "B 2"]:
            prefix, key = prefix_and_key
            answers, lengths = _answers_up_to(batch, prefix, room)
            rewards = model.answer_rewards(params, prompts, prompt_lengths, answers, lengths, closing_id, key)
            return rewards.reshape(-1, 2)

        keys = None if key is None else jax.random.split(jax.random.fold_in(key, first), last - first)
        return jax.lax.map(one, (prefixes[:, first:last].T, keys), batch_size=min(chunk, last - first))

    # A group of a single chunk would not be mapped over, and then live beside the others.
    per_group = -(-count // (max(1, min(LENGTH_GROUPS, count // (2 * chunk))) if descending else 1))
    groups = [group_rewards(first, min(first + per_group, count)) for first in range(0, count, per_group)]
    return jnp.concatenate(groups).transpose(1, 0, 2)


def _answers_up_to(batch: Batch, prefix: Int[Array, "B"], room: int) -> tuple[Int[Array, "BA R"], Int[Array, "BA"]]:
    """Both answers' tokens up to a prefix, and how many these are; what stands behind them is to be masked."""
    rows = batch.answers.shape[0] * 2
    cut = jnp.minimum(jnp.repeat(prefix, 2), batch.prefix_counts.reshape(rows))
    if batch.prefixes is None:
        return batch.answers[..., :room].reshape(rows, room), cut
    at = cut[:, None] - 1
    tokens = jnp.take_along_axis(batch.prefixes.tokens.reshape(rows, -1, room), at[..., None], axis=1)[:, 0]
    return tokens, jnp.take_along_axis(batch.prefixes.lengths.reshape(rows, -1), at, axis=1)[:, 0]


def _texts(batch: Batch, width: int) -> Int[Array, "BA T"]:
    """Each answer's first `width` slots behind its prompt."""
    rows, answers, _ = batch.answers.shape
    prompts = jnp.repeat(batch.prompts, answers, axis=0)
    return jnp.concatenate([prompts, batch.answers[..., :width].reshape(rows * answers, width)], axis=1)
