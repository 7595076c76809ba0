"""Llama 1, 2 and 3 (Touvron et al., 2023): rotary positions, RMS norms, grouped queries, a gated feed-forward."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL, ConfigFields, check_divides
from pargs_jax.models.family import Family
from pargs_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValues,
    Linear,
    Remat,
    Sight,
    attend,
    dropout,
    make_layers,
    run_layers,
    split_heads,
)
from pargs_jax.models.rotary import Rotary, rotate
from pargs_jax.models.tables import Row, linear


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model.

    `dropout` acts on embeddings and residual branches, and only when a key is given. `remat` is for training: see
    `run_layers`.
    """

    vocab_size: int = 32000
    context_length: int = 4096
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    feedforward: int = 11008
    activation: str = "silu"
    norm_epsilon: float = 1e-5
    rotary: Rotary = Rotary()  # noqa: RUF009 (frozen)
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "feedforward": "intermediate_size",
            "activation": "hidden_act",
            "norm_epsilon": "rms_norm_eps",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "tied_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
        },
        read=(
            "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
            "original_max_position_embeddings",
        ),
        harmless=("attention_dropout", "pretraining_tp"),
        must=CAUSAL,
    )  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def max_positions(self) -> int:
        return self.rotary.reach(self.context_length)

    @classmethod
    def from_hf(cls, hf: Any) -> "LlamaConfig":
        """Reads a `transformers.LlamaConfig`; transformers itself translates the older `rope_theta`/`rope_scaling`.

        Raises InputError for one that is invalid or not supported.
        """
        check_divides(hf, "num_attention_heads", "hidden_size")
        check_divides(hf, "num_key_value_heads", "num_attention_heads")
        rotary = Rotary.from_hf(_rope_parameters(hf))
        if hf.head_dim % 2 or (hf.head_dim == 2 and rotary.kind == "dynamic"):
            raise InputError(f"head_dim is {hf.head_dim}, which rotary positions ({rotary.kind}) cannot rotate")
        return cls(rotary=rotary, **cls.HF_FIELDS.read_named(hf))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.LlamaConfig`."""
        return {"model_type": "llama", "rope_parameters": self.rotary.to_hf(), **self.HF_FIELDS.write_named(self)}

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, unrolled=unrolled, rngs=rngs)


def _rope_parameters(hf: Any) -> dict[str, Any]:
    """The parameters that transformers' rotary embedding uses. It reads the config a second time; only then does an
    `original_max_position_embeddings` beside `rope_parameters` replace the one inside."""
    hf.standardize_rope_params()
    return hf.rope_parameters


class RMSNorm(nnx.Module):
    """Root-mean-square norm in fp32; the scale multiplies after the cast back, as the checkpoints were trained."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype) * self.scale[...]


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, query_width, kv_width = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        normal = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, kernel_init=normal, rngs=rngs)

        self.norm1 = RMSNorm(width, config.norm_epsilon)
        self.query = linear(width, query_width, config.attention_bias)
        self.key = linear(width, kv_width, config.attention_bias)
        self.value = linear(width, kv_width, config.attention_bias)
        self.out = linear(query_width, width, config.attention_bias)
        self.norm2 = RMSNorm(width, config.norm_epsilon)
        self.gate = linear(width, config.feedforward, config.mlp_bias)
        self.up = linear(width, config.feedforward, config.mlp_bias)
        self.down = linear(config.feedforward, width, config.mlp_bias)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos_sin: tuple[Array, Array],
        sight: Sight,
        cached: KeyValues | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        config = self.config
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        normed = self.norm1(x)
        q = rotate(split_heads(self.query(normed), config.heads), cos_sin)
        k = rotate(split_heads(self.key(normed), config.kv_heads), cos_sin)
        v = split_heads(self.value(normed), config.kv_heads)
        mixed, kv = attend(q, KeyValues(k, v), sight, cached, config.head_dim**-0.5)
        x = x + dropout(self.out(mixed), config.dropout, attention_key)
        normed = self.norm2(x)
        hidden = ACTIVATIONS[config.activation](self.gate(normed)) * self.up(normed)
        return x + dropout(self.down(hidden), config.dropout, mlp_key), kv


class Llama(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: LlamaConfig, *, unrolled: bool, rngs: nnx.Rngs) -> None:
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
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(tokens), self.config.dropout, embed_key)
        cos_sin = self.config.rotary.cos_sin(positions, self.config.head_dim, self.config.context_length)

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            return block(x, cos_sin, sight, kv, key)

        x, new = run_layers(self.layers, step, x, self.config.layers, cache, layers_key, remat=self.config.remat)
        return self.norm(x), new


FAMILY = Family(
    CausalModel,
    LlamaConfig,
    "model.",
    (
        Row("embed_tokens.weight", "embed.embedding", ("vocabulary", "width")),
        Row("layers.{}.input_layernorm.weight", "layers.{}.norm1.scale"),
        *linear("layers.{}.self_attn.q_proj", "layers.{}.query", ("width", "heads")),
        *linear("layers.{}.self_attn.k_proj", "layers.{}.key", ("width", "heads")),
        *linear("layers.{}.self_attn.v_proj", "layers.{}.value", ("width", "heads")),
        *linear("layers.{}.self_attn.o_proj", "layers.{}.out", ("heads", "width")),
        Row("layers.{}.post_attention_layernorm.weight", "layers.{}.norm2.scale"),
        *linear("layers.{}.mlp.gate_proj", "layers.{}.gate", ("width", "feedforward")),
        *linear("layers.{}.mlp.up_proj", "layers.{}.up", ("width", "feedforward")),
        *linear("layers.{}.mlp.down_proj", "layers.{}.down", ("feedforward", "width")),
        Row("norm.weight", "norm.scale"),
    ),
    class_prefix="Llama",
    ignored=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
