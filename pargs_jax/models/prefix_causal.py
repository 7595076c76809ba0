"""An encoder's weights with prefix-causal attention: one pass reads all prefixes of an answer, and decoding uses a
cache.

Prompt tokens see the whole prompt. Answer tokens see the prompt, the answer tokens before them and themselves. The
reward of a prefix is read at its last token. The weights are an encoder's, fine-tuned with this attention.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.cache import Cache, with_slots
from pargs_jax.models.causal import shift_left
from pargs_jax.models.disentangled import CachedLayer
from pargs_jax.models.heads import ENCODER_HEADS
from pargs_jax.models.model import HeadName, Model, PackedPrompts, Params
from pargs_jax.models.one_pass import OnePass


@dataclasses.dataclass(frozen=True)
class PrefixCausalModel(OnePass, Model):
    """A DeBERTa reward model with prefix-causal attention. Its interface is that of `CausalModel` without `siblings`
    and `keep`.

    Raises InputError for a model with a convolution, because a convolution lets every token see the next one.
    """

    head: HeadName = "reward"
    heads: ClassVar = ENCODER_HEADS
    reads_candidates: ClassVar[bool] = False
    shares_prompts: ClassVar[bool] = False
    """Relative positions are distances between slots, which a second answer to a packed prompt would not have."""

    def __post_init__(self) -> None:
        if self.config.convolution_width:
            raise InputError("prefix_causal attention: does not work with a convolution, which looks ahead; use full")

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of texts. The first `prompt_width` slots are the prompt's, and `start[b]` of them are
        padding. Right padding needs no mask. A key turns dropout on."""
        start = jnp.zeros(len(tokens), jnp.int32) if start is None else start
        valid = jnp.arange(tokens.shape[1]) >= start[:, None]
        return self._encode(params, tokens, valid, key, prompt_width, keep=False)[0]

    def encode_packed(
        self, params: Params, packed: PackedPrompts, key: PRNGKeyArray | None = None
    ) -> Float[Array, "G N D"]:
        """Final hidden states of packed texts, each prompt with one answer. A key turns dropout on."""
        slots = jnp.arange(packed.tokens.shape[1])
        in_segment = packed.segments[:, :, None] == packed.segments[:, None]
        sees = in_segment & ((packed.answers[:, None] == 0) | (slots[:, None] >= slots))
        is_answer = (packed.answers > 0).astype(jnp.int32)
        backbone = self.network(params).backbone
        return backbone(packed.tokens, packed.positions, sees, packed.segments >= 0, is_answer, key)[0]

    def rewards(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Rewards (fp32) of the texts that end at each hidden state."""
        return self.network(params).head(hidden)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], slots: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Reads left-padded prompts into a cache of `slots` slots a row. Also returns each prompt's last hidden state.

        The cache also holds the layers' projected relative positions, which depend only on weights.
        """
        width = prompts.shape[1]
        valid = jnp.arange(width) < lengths[:, None]
        hidden, cached = self._encode(params, shift_left(prompts, lengths), valid, None, width, keep=True)
        if self.unrolled:
            kv, tables = tuple(layer.kv for layer in cached), tuple(layer.table for layer in cached)
        else:
            kv, tables = cached
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return last, Cache(with_slots(kv, slots), lengths, tables)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B T"],
        offsets: Int[Array, "B T"],
        mask: Bool[Array, "*B T T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of T new tokens, and their keys and values for `Cache.append`. Each token stands `offsets[b,
        t]` positions after the cached text and sees all of it; `mask[..., t, s]` says whether token t sees token s."""
        layers: Any = CachedLayer(cache.kv, cache.tables)
        if self.unrolled:
            layers = tuple(map(CachedLayer, cache.kv, cache.tables))
        segments = jnp.ones_like(tokens)
        return self.network(params).backbone.extend(tokens, offsets, mask, layers, cache.lengths, segments)

    def _encode(
        self, params: Params, tokens: Array, valid: Array, key: PRNGKeyArray | None, width: int, *, keep: bool
    ) -> tuple[Array, Any]:
        slots = jnp.arange(tokens.shape[1])
        sees = (slots[:, None] >= slots) | (slots < width)
        segments = jnp.broadcast_to(slots >= width, tokens.shape).astype(jnp.int32)
        first = jnp.argmax(valid, axis=1)
        positions = jnp.maximum(slots - first[:, None], 0)
        return self.network(params).backbone(
            tokens, positions, sees & valid[:, None, :], valid, segments, key, keep=keep
        )
