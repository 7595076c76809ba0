"""GPT-2 (Radford et al., 2019): learned positions, pre-norm blocks."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL, FALSE, ConfigFields, EvenHeads, check_divides
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
    layer_norm,
    make_layers,
    run_layers,
    split_heads,
)
from pargs_jax.models.tables import Row, linear, norm


@dataclasses.dataclass(frozen=True)
class GPT2Config(EvenHeads):
    """The shape of a GPT-2 model.

    `dropout` acts on embeddings and residual branches, and only when a key is given. `remat` is for training: see
    `run_layers`.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 3072
    activation: str = "gelu_new"
    norm_epsilon: float = 1e-5
    scale_attention: bool = True
    scale_by_layer: bool = False
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner",
            "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "feedforward": "n_inner",
            "activation": "activation_function",
            "norm_epsilon": "layer_norm_epsilon",
            "scale_attention": "scale_attn_weights",
            "scale_by_layer": "scale_attn_by_inverse_layer_idx",
            "tied_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
        },
        harmless=(
            "n_ctx",
            "reorder_and_upcast_attn",  # attention is always computed in fp32 here
        ),
        must={**CAUSAL, "add_cross_attention": FALSE},
    )  # fmt: skip

    @classmethod
    def from_hf(cls, hf: Any) -> "GPT2Config":
        """Reads a `transformers.GPT2Config`. Raises InputError for one that is invalid or not supported."""
        check_divides(hf, "n_head", "n_embd")
        named = cls.HF_FIELDS.read_named(hf)
        return cls(**named | {"feedforward": named["feedforward"] or 4 * hf.n_embd})

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.GPT2Config`."""
        return {"model_type": "gpt2", **self.HF_FIELDS.write_named(self)}

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "GPT2":
        return GPT2(self, unrolled=unrolled, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, std = config.width, config.initializer_range
        normal = nnx.initializers.normal(std)
        # Residual projections start smaller, so that the residual stream's variance does not grow with depth.
        residual = nnx.initializers.normal(std / math.sqrt(2 * config.layers))
        self.norm1 = layer_norm(width, config.norm_epsilon, rngs)
        self.query, self.key, self.value = (Linear(width, width, kernel_init=normal, rngs=rngs) for _ in range(3))
        self.out = Linear(width, width, kernel_init=residual, rngs=rngs)
        self.norm2 = layer_norm(width, config.norm_epsilon, rngs)
        self.up = Linear(width, config.feedforward, kernel_init=normal, rngs=rngs)
        self.down = Linear(config.feedforward, width, kernel_init=residual, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        index: int | Int[Array, ""],
        sight: Sight,
        cached: KeyValues | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        config = self.config
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        normed = self.norm1(x)
        q, k, v = (split_heads(part(normed), config.heads) for part in (self.query, self.key, self.value))
        scale: float | Array = config.head_dim**-0.5 if config.scale_attention else 1.0
        if config.scale_by_layer:
            scale = scale / (index + 1)
        mixed, kv = attend(q, KeyValues(k, v), sight, cached, scale)
        x = x + dropout(self.out(mixed), config.dropout, attention_key)
        hidden = ACTIVATIONS[config.activation](self.up(self.norm2(x)))
        return x + dropout(self.down(hidden), config.dropout, mlp_key), kv


class GPT2(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: GPT2Config, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.initializer_range, rngs=rngs)
        self.positions = Embedding(config.context_length, config.width, config.initializer_range, rngs=rngs)
        self.layers = make_layers(lambda rngs: Block(config, rngs=rngs), config.layers, unrolled, rngs)
        self.norm = layer_norm(config.width, config.norm_epsilon, rngs)

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
        x = dropout(self.embed(tokens) + self.positions(positions), self.config.dropout, embed_key)

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            return block(x, index, sight, kv, key)

        x, new = run_layers(self.layers, step, x, self.config.layers, cache, layers_key, remat=self.config.remat)
        return self.norm(x), new


FAMILY = Family(
    CausalModel,
    GPT2Config,
    "transformer.",
    (
        Row("wte.weight", "embed.embedding", ("vocabulary", "width")),
        Row("wpe.weight", "positions.embedding", (None, "width")),
        *norm("h.{}.ln_1", "layers.{}.norm1"),
        # GPT-2 keeps its linear layers as [in, out], which is our order already.
        *linear("h.{}.attn.c_attn", "layers.{}.query", ("width", "heads"), transpose=False),
        *linear("h.{}.attn.c_attn", "layers.{}.key", ("width", "heads"), transpose=False),
        *linear("h.{}.attn.c_attn", "layers.{}.value", ("width", "heads"), transpose=False),
        *linear("h.{}.attn.c_proj", "layers.{}.out", ("heads", "width"), transpose=False),
        *norm("h.{}.ln_2", "layers.{}.norm2"),
        *linear("h.{}.mlp.c_fc", "layers.{}.up", ("width", "feedforward"), transpose=False),
        *linear("h.{}.mlp.c_proj", "layers.{}.down", ("feedforward", "width"), transpose=False),
        *norm("ln_f", "norm"),
    ),
    class_prefix="GPT2",
    class_names={"vocabulary": "GPT2LMHeadModel", "table": "GPT2LMHeadModel"},
    ignored=r"h\.\d+\.attn\.(masked_)?bias",
)
