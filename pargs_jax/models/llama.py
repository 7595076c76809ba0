"""Llama 1, 2 and 3 (Touvron et al., 2023): rotary positions, RMS norms, grouped queries, a gated feed-forward.

Mistral, Phi-3, Qwen and Gemma are made of the same parts; their files say what they change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL, FALSE, ConfigFields, check_divides
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
from pargs_jax.models.windows import Windows, sights_of_layers

SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "feedforward": "intermediate_size",
    "activation": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
ROTARY_FIELDS = (
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
)  # fmt: skip
"""Fields of config.json that all families with these parts have."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model, or of a relative.

    `attention_bias` says whether queries, keys and values have biases. `windows` are the sliding windows of the layers.
    `dropout` acts on embeddings and residual branches, and only when a key is given. `remat` is for training: see
    `run_layers`.

    Relatives override what is the same in all their models: `head_norms` (whether each head's queries and keys are
    normalised), `out_bias` (whether attention's output has a bias), `attention_scale` and `attention_cap` (see
    `attend`), and `may_rotate_partly` (whether a part of each head may stay unrotated).
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
    windows: Windows = ()
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    head_norms: ClassVar[bool] = False
    attention_cap: ClassVar[float | None] = None
    may_rotate_partly: ClassVar[bool] = False
    model_type: ClassVar[str] = "llama"
    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=SIZES,
        names={**NAMES, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        read=ROTARY_FIELDS,
        harmless=("pretraining_tp",),
        must={**CAUSAL, "rope_interleaved": FALSE},
    )

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries, must have one for each of {self.layers} layers")

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def max_positions(self) -> int:
        return self.rotary.reach(self.context_length)

    @property
    def out_bias(self) -> bool:
        return self.attention_bias

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @classmethod
    def from_hf(cls, hf: Any, **others: Any) -> Self:
        """Reads a config of transformers; transformers itself translates the older `rope_theta`/`rope_scaling`.
        `others` are values that a relative has read itself.

        Raises InputError for one that is invalid or not supported.
        """
        head_dim = getattr(hf, "head_dim", None)
        if head_dim is None:
            check_divides(hf, "num_attention_heads", "hidden_size")
            head_dim = hf.hidden_size // hf.num_attention_heads
        check_divides(hf, "num_key_value_heads", "num_attention_heads")
        if "rotary" not in others:
            others["rotary"] = Rotary.from_hf(rope_parameters(hf), head_dim, may_be_partial=cls.may_rotate_partly)
        return cls(head_dim=head_dim, **others, **cls.HF_FIELDS.read_named(hf))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config of transformers."""
        return {
            "model_type": self.model_type,
            "head_dim": self.head_dim,
            "rope_parameters": self.rotary.to_hf(),
            **self.HF_FIELDS.write_named(self),
        }

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, unrolled=unrolled, rngs=rngs)


def rope_parameters(hf: Any) -> dict[str, Any]:
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
    """One layer. Gemma's inherits from it, with another norm."""

    make_norm: ClassVar[Callable[[int, float], nnx.Module]] = RMSNorm

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, query_width, kv_width = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        normal = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, kernel_init=normal, rngs=rngs)

        self.norm1 = self.make_norm(width, config.norm_epsilon)
        self.query = linear(width, query_width, config.attention_bias)
        self.key = linear(width, kv_width, config.attention_bias)
        self.value = linear(width, kv_width, config.attention_bias)
        if config.head_norms:
            self.query_norm = self.make_norm(config.head_dim, config.norm_epsilon)
            self.key_norm = self.make_norm(config.head_dim, config.norm_epsilon)
        self.out = linear(query_width, width, config.out_bias)
        self.norm2 = self.make_norm(width, config.norm_epsilon)
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
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        mixed, kv = self.attention(self.norm1(x), cos_sin, sight, cached)
        x = x + dropout(mixed, self.config.dropout, attention_key)
        return x + dropout(self.feedforward(self.norm2(x)), self.config.dropout, mlp_key), kv

    def attention(
        self, x: Float[Array, "B T D"], cos_sin: tuple[Array, Array], sight: Sight, cached: KeyValues | None
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        config = self.config
        q = split_heads(self.query(x), config.heads)
        k = split_heads(self.key(x), config.kv_heads)
        v = split_heads(self.value(x), config.kv_heads)
        if config.head_norms:
            q, k = self.query_norm(q), self.key_norm(k)
        new = KeyValues(rotate(k, cos_sin), v)
        mixed, kv = attend(rotate(q, cos_sin), new, sight, cached, config.attention_scale, config.attention_cap)
        return self.out(mixed), kv

    def feedforward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))


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
        sights = sights_of_layers(sight, positions, self.config.windows)

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            return block(x, cos_sin, sights(index), kv, key)

        x, new = run_layers(self.layers, step, x, self.config.layers, cache, layers_key, remat=self.config.remat)
        return self.norm(x), new


SHARED_ROWS = (
    Row("embed_tokens.weight", "embed.embedding", ("vocabulary", "width")),
    Row("layers.{}.input_layernorm.weight", "layers.{}.norm1.scale"),
    *linear("layers.{}.self_attn.o_proj", "layers.{}.out", ("heads", "width")),
    *linear("layers.{}.mlp.down_proj", "layers.{}.down", ("feedforward", "width")),
    Row("norm.weight", "norm.scale"),
)
NORM2_ROW = Row("layers.{}.post_attention_layernorm.weight", "layers.{}.norm2.scale")
SEPARATE_ROWS = (
    *linear("layers.{}.self_attn.q_proj", "layers.{}.query", ("width", "heads")),
    *linear("layers.{}.self_attn.k_proj", "layers.{}.key", ("width", "heads")),
    *linear("layers.{}.self_attn.v_proj", "layers.{}.value", ("width", "heads")),
    Row("layers.{}.self_attn.q_norm.weight", "layers.{}.query_norm.scale"),
    Row("layers.{}.self_attn.k_norm.weight", "layers.{}.key_norm.scale"),
    *linear("layers.{}.mlp.gate_proj", "layers.{}.gate", ("width", "feedforward")),
    *linear("layers.{}.mlp.up_proj", "layers.{}.up", ("width", "feedforward")),
)
ROWS = (*SHARED_ROWS, NORM2_ROW, *SEPARATE_ROWS)
FREQUENCIES = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
"""Tensors that old checkpoints contain and nobody needs."""

FAMILY = Family(CausalModel, LlamaConfig, "model.", ROWS, class_prefix="Llama", ignored=FREQUENCIES)
