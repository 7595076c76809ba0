"""An encoder as a reward model: it reads whole texts, and every prefix is a text of its own."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.heads import ENCODER_HEADS
from pargs_jax.models.model import HeadName, Model, Params


@dataclasses.dataclass(frozen=True)
class EncoderModel(Model):
    """A DeBERTa with a scalar head, as published: all tokens of a text see each other."""

    head: HeadName = "reward"
    heads: ClassVar = ENCODER_HEADS

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        end: Int[Array, "B"],
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of texts that are the slots `start[b] <= s < end[b]`; what stands elsewhere is not seen.

        Slots from `prompt_width` on are the second segment, for models that tell segments apart. A key turns dropout
        on.
        """
        return self._run(params, tokens, start, end, key, prompt_width, None)

    def _run(
        self,
        params: Params,
        tokens: Array,
        start: Array,
        end: Array,
        key: PRNGKeyArray | None,
        prompt_width: int | None,
        only: Array | None,
    ) -> Array:
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
        """Rewards (fp32) of those texts, read at their first token, `[CLS]`."""
        first = self._run(params, tokens, start, end, key, prompt_width, start)
        return self.network(params).head(first[:, 0])

    def answer_rewards(
        self,
        params: Params,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        answers: Int[Array, "B R"],
        lengths: Int[Array, "B"],
        closing_id: int,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B"]:
        """Rewards of answers to left-padded prompts, each read as a finished text: `[CLS] prompt [SEP] answer [SEP]`.

        An answer is closed by `closing_id` unless its last token is that already; an empty one too, so that it is
        `[CLS] prompt [SEP] [SEP]`, the template of a pair. (transformers takes an empty string for no second text.)

        Args:
            params: the model's.
            prompts, prompt_lengths: ids that end in the closing token, and how many are real.
            answers, lengths: ids, and how many of them count; what stands behind them is not seen.
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
