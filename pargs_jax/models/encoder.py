"""An encoder as a reward model: it reads whole texts, so every prefix is a separate text."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.heads import ENCODER_HEADS
from pargs_jax.models.model import HeadName, Model, Params, PromptsWithAnswers

LENGTH_GROUPS = 4
"""The number of widths to which prefixes of decreasing length are padded; each is compiled separately."""


@dataclasses.dataclass(frozen=True)
class EncoderModel(Model):
    """An encoder with a scalar head, as published: all tokens of a text see each other."""

    head: HeadName = "reward"
    heads: ClassVar = ENCODER_HEADS
    one_pass: ClassVar[bool] = False
    reads_candidates: ClassVar[bool] = False

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        end: Int[Array, "B"],
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int | None = None,
        only: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of texts. Text b is in the slots `start[b] <= s < end[b]`; other slots are masked.

        Slots from `prompt_width` on are the second segment, for models with segment embeddings. A key turns dropout on.
        With `only`, T is 1: the result is the state at slot `only[b]` of each row.
        """
        slots = jnp.arange(tokens.shape[1])
        valid = (slots >= start[:, None]) & (slots < end[:, None])
        positions = jnp.maximum(slots - start[:, None], 0)
        mask = valid[:, None, :] & valid[:, :, None]
        segments = None if prompt_width is None else jnp.broadcast_to(slots >= prompt_width, tokens.shape).astype(int)
        return self.network(params).backbone(tokens, positions, mask, valid, segments, key, only=only)[0]

    def text_rewards(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        end: Int[Array, "B"],
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int | None = None,
    ) -> Float[Array, "B"]:
        """Rewards (fp32) of the same texts, read at their first token, `[CLS]`, or at the mean of all, as the config's
        `pooling` says."""
        if self.config.pooling == "cls":
            first = self.encode(params, tokens, start, end, key, prompt_width=prompt_width, only=start)
            return self.network(params).head(first[:, 0])
        hidden = self.encode(params, tokens, start, end, key, prompt_width=prompt_width).astype(jnp.float32)
        slots = jnp.arange(tokens.shape[1])
        valid = (slots >= start[:, None]) & (slots < end[:, None])
        total = jnp.where(valid[..., None], hidden, 0).sum(axis=1)
        return self.network(params).head(total / jnp.maximum(end - start, 1)[:, None])

    def answer_rewards(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        answers: Int[Array, "B R"],
        lengths: Int[Array, "B"],
        closing_id: int | Int[Array, ""],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B"]:
        """Rewards (fp32) of answers to left-padded prompts, each read as a finished text: `[CLS] prompt [SEP] answer
        [SEP]`.

        `closing_id` is appended to an answer unless it already ends with it. An empty answer gives `[CLS] prompt [SEP]
        [SEP]`, the template of a pair. (transformers treats an empty second text as missing.)

        Args:
            params: the model's parameters.
            prompts, prompt_lengths: ids that end in the closing token, and how many of them are real.
            answers, lengths: ids, and how many of them count; later ones are masked.
            closing_id: the token that closes a text.
            key: turns dropout on.
        """
        width = prompts.shape[1]
        texts = jnp.concatenate([prompts, answers, jnp.zeros_like(answers[:, :1])], axis=1)
        end = width + lengths
        last = jnp.take_along_axis(texts, end[:, None] - 1, axis=1)[:, 0]
        is_closed = (lengths > 0) & (last == closing_id)
        texts = jnp.where(jnp.arange(texts.shape[1]) == end[:, None], closing_id, texts)
        return self.text_rewards(params, texts, width - prompt_lengths, end + ~is_closed, key, prompt_width=width)

    def read_answers(
        self,
        params: Params,
        batch: PromptsWithAnswers,
        key: PRNGKeyArray | None = None,
        *,
        closing_id: int | None = None,
        chunk: int = 1,
    ) -> "SeparateOutputs":
        """Prepares to read prefixes of answers, `chunk` at once, each closed by `closing_id`. They are read only when
        `rewards_at` asks for them. A key turns dropout on. Raises ValueError without a `closing_id`."""
        if closing_id is None:
            raise ValueError("an encoder reads every prefix as a finished text, so it needs a closing_id")
        return SeparateOutputs(self, params, batch, key, closing_id, chunk)


@dataclasses.dataclass(frozen=True, eq=False)
class SeparateOutputs:
    """An encoder's outputs for a batch of prompts with answers: only rewards, and only of the prefixes asked for."""

    model: EncoderModel
    params: Params
    batch: PromptsWithAnswers
    key: PRNGKeyArray | None
    closing_id: int
    chunk: int
    one_pass: ClassVar[bool] = False

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N A"]:
        """Rewards of prefixes of these lengths (at least 1), each read as a finished text (`answer_rewards`). Where an
        answer is shorter than the length, the reward of the whole answer is repeated.

        `lax.map` reads `chunk` prefixes at a time (A B chunk texts). Only rewards are kept for the backward pass, which
        reads each chunk again, so memory is that of one chunk. `descending` promises that each row's lengths strictly
        decrease; later prefixes are then read at smaller widths.
        """
        batch = self.batch
        count, (_, answers, width) = lengths.shape[1], batch.answers.shape
        prompts, prompt_lengths = (jnp.repeat(x, answers, axis=0) for x in (batch.prompts, batch.prompt_lengths))
        descending = descending and batch.prefixes is None

        def group_rewards(first: int, last: int) -> Float[Array, "N B A"]:
            answer_width = width - first if descending else width

            @jax.checkpoint
            def one(prefix_and_key: tuple[Int[Array, "B"], PRNGKeyArray | None]) -> Float[Array, "B A"]:
                prefix, key = prefix_and_key
                texts = _answers_up_to(batch, prefix, answer_width)
                rewards = self.model.answer_rewards(self.params, prompts, prompt_lengths, *texts, self.closing_id, key)
                return rewards.reshape(-1, answers)

            keys = None if self.key is None else jax.random.split(jax.random.fold_in(self.key, first), last - first)
            return jax.lax.map(one, (lengths[:, first:last].T, keys), batch_size=min(self.chunk, last - first))

        # A group with a single chunk would not be mapped; its memory would then be held together with the other
        # groups'.
        groups = max(1, min(LENGTH_GROUPS, count // (2 * self.chunk))) if descending else 1
        per_group = -(-count // groups)
        rewards = [group_rewards(first, min(first + per_group, count)) for first in range(0, count, per_group)]
        return jnp.concatenate(rewards).transpose(1, 0, 2)


def _answers_up_to(
    batch: PromptsWithAnswers, prefix: Int[Array, "B"], answer_width: int
) -> tuple[Int[Array, "BA R"], Int[Array, "BA"]]:
    """The tokens of all answers up to a prefix, and how many they are; the caller masks the rest."""
    rows, answers, _ = batch.answers.shape
    cut = jnp.minimum(jnp.repeat(prefix, answers), batch.prefix_counts.reshape(-1))
    if batch.prefixes is None:
        return batch.answers[..., :answer_width].reshape(rows * answers, answer_width), cut
    tokens, lengths = (x.reshape(rows * answers, *x.shape[2:]) for x in batch.prefixes[:2])
    at = cut[:, None] - 1
    tokens = jnp.take_along_axis(tokens, at[..., None], axis=1)[:, 0]
    return tokens, jnp.take_along_axis(lengths, at, axis=1)[:, 0]
