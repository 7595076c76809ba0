"""Gemma 2 (Gemma Team, 2024): Llama with norms before and after each half of a layer, capped scores and logits, scaled
embeddings, and a sliding window in every second layer."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models import llama
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL_WITH_WINDOWS, FALSE, ConfigFields
from pargs_jax.models.family import Family
from pargs_jax.models.layers import Embedding, KeyValues, Sight, dropout, make_layers, run_layers
from pargs_jax.models.llama import LlamaConfig
from pargs_jax.models.rotary import Rotary
from pargs_jax.models.tables import Row
from pargs_jax.models.windows import fields_of_windows, sights_of_layers, windows_of_layers

NAMES = {
    **llama.NAMES,
    "activation": "hidden_activation",
    "attention_bias": "attention_bias",
    "query_scalar": "query_pre_attn_scalar",
    "logit_cap": "final_logit_softcapping",
}
"""The fields that Gemma 2 and 3 share."""


@dataclasses.dataclass(frozen=True)
class Gemma2Config(LlamaConfig):
    """The shape of a Gemma model. `query_scalar` replaces the width of a head in the scale of attention scores. Caps
    limit numbers smoothly (`soft_cap`); None means no cap.

    `local_rotary`, which Gemma 3 overrides, is the rotation in layers with a sliding window; None means that all layers
    have the same.
    """

    query_scalar: int = 256
    attention_cap: float | None = 50.0
    logit_cap: float | None = 30.0
    local_rotary: ClassVar[Rotary | None] = None
    model_type: ClassVar[str] = "gemma2"
    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(*llama.SIZES, "sliding_window", "query_pre_attn_scalar"),
        names={**NAMES, "attention_cap": "attn_logit_softcapping"},
        read=(*llama.ROTARY_FIELDS, "layer_types"),
        harmless=("hidden_act", "sliding_window_size"),
        must={**CAUSAL_WITH_WINDOWS, "use_bidirectional_attention": FALSE},
    )

    @property
    def attention_scale(self) -> float:
        return self.query_scalar**-0.5

    @classmethod
    def from_hf(cls, hf: Any, **others: Any) -> Self:
        return super().from_hf(hf, windows=windows_of_layers(hf), **others)

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), **fields_of_windows(self.windows, self.layers)}

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "Gemma":
        return Gemma(self, unrolled=unrolled, rngs=rngs)


class RMSNorm(nnx.Module):
    """Root-mean-square norm whose scale is stored as the difference from 1; all in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Block(llama.Block):
    make_norm = RMSNorm

    def __init__(self, config: Gemma2Config, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.post_norm1 = RMSNorm(config.width, config.norm_epsilon)
        self.post_norm2 = RMSNorm(config.width, config.norm_epsilon)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Array, Array],
        sight: Sight,
        cached: KeyValues | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        mixed, kv = self.attention(self.norm1(x), cos_sin, sight, cached)
        x = x + dropout(self.post_norm1(mixed), self.config.dropout, attention_key)
        hidden = self.feedforward(self.norm2(x))
        return x + dropout(self.post_norm2(hidden), self.config.dropout, mlp_key), kv


class Gemma(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: Gemma2Config, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.initializer_range, rngs=rngs)
        self.layers = make_layers(lambda rngs: Block(config, rngs=rngs), config.layers, unrolled, rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        sight: Sight,
        cache: Any = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states, and what each layer returns (see `attend`; `run_layers` says in which form)."""
        config = self.config
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = self.embed(tokens)
        x = dropout(x * jnp.asarray(config.width**0.5, x.dtype), config.dropout, embed_key)
        sights = sights_of_layers(sight, positions, config.windows)
        cos_sin = config.rotary.cos_sin(positions, config.head_dim, config.context_length)
        local = config.local_rotary and config.local_rotary.cos_sin(positions, config.head_dim, config.context_length)
        is_local = jnp.asarray([window is not None for window in config.windows])

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            turns = cos_sin
            if local and config.windows:
                turns = jax.tree.map(lambda near, far: jnp.where(is_local[index], near, far), local, cos_sin)
            return block(x, turns, sights(index), kv, key)

        x, new = run_layers(self.layers, step, x, config.layers, cache, layers_key, remat=config.remat)
        return self.norm(x), new


ROWS = (
    *llama.SHARED_ROWS,
    *llama.SEPARATE_ROWS,
    Row("layers.{}.post_attention_layernorm.weight", "layers.{}.post_norm1.scale"),
    Row("layers.{}.pre_feedforward_layernorm.weight", "layers.{}.norm2.scale"),
    Row("layers.{}.post_feedforward_layernorm.weight", "layers.{}.post_norm2.scale"),
)

FAMILY = Family(CausalModel, Gemma2Config, "model.", ROWS, class_prefix="Gemma2")
