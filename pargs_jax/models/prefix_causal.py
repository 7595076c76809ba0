"""An encoder's weights with prefix-causal attention: all prefixes of an answer in one pass, and a cache when decoding.

Tokens of the prompt see the whole prompt; tokens of the answer see the prompt, those before them and themselves. The
reward of a prefix is read at its last token. The weights are those of the encoder, fine-tuned with this attention.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.cache import Cache, with_room
from pargs_jax.models.deberta import CachedLayer
from pargs_jax.models.disentangled import BLOCK
from pargs_jax.models.heads import PooledRewardHead
from pargs_jax.models.model import HeadName, Model, Params


@dataclasses.dataclass(frozen=True)
class PrefixCausalModel(Model):
    """A DeBERTa reward model with prefix-causal attention; the interface is that of `CausalModel`.

    Raises InputError for a model with a convolution, which mixes every token with the one after it.
    """

    head: HeadName = "reward"

    def __post_init__(self) -> None:
        if self.config.convolution_width:
            raise InputError("prefix_causal attention: not for a model with a convolution, which looks ahead; use full")

    def make_head(self, rngs: nnx.Rngs) -> PooledRewardHead:
        config = self.config
        return PooledRewardHead(config.width, config.pooler_activation, config.initializer_range, rngs=rngs)

    def encode(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        prompt_width: int,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of texts whose first `prompt_width` slots are the prompt's, `start[b]` of them padding.
        Right padding needs no mask. A key turns dropout on."""
        return self._encode(params, tokens, start, key, prompt_width, keep=False)[0]

    def rewards(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Rewards (fp32) of the texts that end at each hidden state."""
        return self.network(params).head(hidden)

    def prefill(
        self, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """Reads left-padded prompts into a cache with room for `capacity` tokens; returns their hidden states too.

        The cache holds the layers' projections of relative positions as well, which depend on weights alone.
        """
        width = prompts.shape[1]
        start = width - lengths
        hidden, kept = self._encode(params, prompts, start, None, width, keep=True)
        if self.unrolled:
            kv, tables = tuple(layer.kv for layer in kept), tuple(layer.table for layer in kept)
        else:
            kv, tables = kept
        slots = -(-capacity // BLOCK) * BLOCK
        return hidden, Cache(with_room(kv, width, slots), start, jnp.asarray(width, jnp.int32), tables)

    def extend(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B T"],
        offsets: Int[Array, "B T"],
        mask: Bool[Array, "*B T T"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of T new tokens that stand `offsets` tokens after the cached prefix, which all of them see;
        `mask[..., t, s]` says whether token t sees token s. Also their pending keys and values."""
        layers: Any = CachedLayer(cache.kv, cache.tables)
        if self.unrolled:
            layers = tuple(map(CachedLayer, cache.kv, cache.tables))
        end = jnp.broadcast_to(cache.length, cache.start.shape)
        segments = jnp.ones_like(tokens)
        return self.network(params).backbone.extend(tokens, offsets, mask, layers, cache.start, end, segments)

    def _encode(
        self, params: Params, tokens: Array, start: Array | None, key: PRNGKeyArray | None, width: int, *, keep: bool
    ) -> tuple[Array, Any]:
        batch, length = tokens.shape
        start = jnp.zeros(batch, jnp.int32) if start is None else start
        slots = jnp.arange(length)
        valid = slots >= start[:, None]
        sees = (slots[:, None] >= slots) | (slots < width)
        segments = jnp.broadcast_to(slots >= width, tokens.shape).astype(jnp.int32)
        positions = jnp.maximum(slots - start[:, None], 0)
        return self.network(params).backbone(
            tokens, positions, sees & valid[:, None, :], valid, segments, key, keep=keep
        )
