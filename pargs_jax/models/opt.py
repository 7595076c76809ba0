"""OPT (Zhang et al., 2022): learned positions that start at row 2; only 350m has projections and post-norm blocks."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.config_fields import CAUSAL, ConfigFields, EvenHeads, check_divides
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

POSITION_OFFSET = 2
"""The number of rows that checkpoints keep before the first position; no text uses them."""


@dataclasses.dataclass(frozen=True)
class OPTConfig(EvenHeads):
    """The shape of an OPT model.

    `dropout` acts on residual branches, and only when a key is given. `remat` is for training: see `run_layers`.

    Where `embedding_width` is not `width`, one matrix projects token embeddings to `width` before the blocks, and
    another projects back after them, so heads see `embedding_width`. `norm_first` puts a block's norms before attention
    and feed-forward; otherwise they come after each residual sum, and there is no final norm. `final_norm=False` also
    removes the final norm of models with `norm_first`. `biases` are those of the linear layers. Without
    `learned_norms`, norms have neither scale nor bias.
    """

    vocab_size: int = 50272
    context_length: int = 2048
    width: int = 768
    embedding_width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 3072
    activation: str = "relu"
    norm_first: bool = True
    final_norm: bool = True
    biases: bool = True
    learned_norms: bool = True
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "max_position_embeddings", "hidden_size", "word_embed_proj_dim", "num_hidden_layers",
            "num_attention_heads", "ffn_dim",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "width": "hidden_size",
            "embedding_width": "word_embed_proj_dim",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "feedforward": "ffn_dim",
            "activation": "activation_function",
            "norm_first": "do_layer_norm_before",
            "biases": "enable_bias",
            "learned_norms": "layer_norm_elementwise_affine",
            "tied_embeddings": "tie_word_embeddings",
            "initializer_range": "init_std",
        },
        read=("_remove_final_layer_norm",),
        must=CAUSAL,
    )  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.embedding_width

    @classmethod
    def from_hf(cls, hf: Any) -> "OPTConfig":
        """Reads a `transformers.OPTConfig`. Raises InputError for one that is invalid or not supported."""
        check_divides(hf, "num_attention_heads", "hidden_size")
        return cls(final_norm=not hf._remove_final_layer_norm, **cls.HF_FIELDS.read_named(hf))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.OPTConfig`."""
        named = self.HF_FIELDS.write_named(self)
        return {"model_type": "opt", "_remove_final_layer_norm": not self.final_norm, **named}

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "OPT":
        return OPT(self, unrolled=unrolled, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, config: OPTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        normal = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, use_bias=config.biases, kernel_init=normal, rngs=rngs)

        self.norm1 = layer_norm(config.width, 1e-5, rngs, learned=config.learned_norms)
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.out = linear(width, width)
        self.norm2 = layer_norm(config.width, 1e-5, rngs, learned=config.learned_norms)
        self.up = linear(width, config.feedforward)
        self.down = linear(config.feedforward, width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sight: Sight,
        cached: KeyValues | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        config = self.config
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        seen = self.norm1(x) if config.norm_first else x
        q, k, v = (split_heads(project(seen), config.heads) for project in (self.query, self.key, self.value))
        mixed, kv = attend(q, KeyValues(k, v), sight, cached, config.head_dim**-0.5)
        x = x + dropout(self.out(mixed), config.dropout, attention_key)
        if not config.norm_first:
            x = self.norm1(x)
        seen = self.norm2(x) if config.norm_first else x
        hidden = ACTIVATIONS[config.activation](self.up(seen))
        x = x + dropout(self.down(hidden), config.dropout, mlp_key)
        return x if config.norm_first else self.norm2(x), kv


class OPT(nnx.Module):
    """The backbone: token ids to final hidden states, which are as wide as the token embeddings."""

    def __init__(self, config: OPTConfig, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        width, outer, std = config.width, config.embedding_width, config.initializer_range
        normal = nnx.initializers.normal(std)

        def project(inputs: int, outputs: int) -> Linear | None:
            return None if width == outer else Linear(inputs, outputs, use_bias=False, kernel_init=normal, rngs=rngs)

        self.embed = Embedding(config.vocab_size, outer, std, rngs=rngs)
        self.positions = Embedding(POSITION_OFFSET + config.context_length, width, std, rngs=rngs)
        self.project_in = project(outer, width)
        self.layers = make_layers(lambda rngs: Block(config, rngs=rngs), config.layers, unrolled, rngs)
        has_norm = config.norm_first and config.final_norm
        self.norm = layer_norm(width, 1e-5, rngs, learned=config.learned_norms) if has_norm else None
        self.project_out = project(width, outer)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        sight: Sight,
        cache: Any = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T E"], Any]:
        """Final hidden states, and what each layer returns (see `attend`; `run_layers` says in which form)."""
        x = self.embed(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions(POSITION_OFFSET + positions)

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            return block(x, sight, kv, key)

        x, new = run_layers(self.layers, step, x, self.config.layers, cache, key, remat=self.config.remat)
        if self.norm is not None:
            x = self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x, new


FAMILY = Family(
    CausalModel,
    OPTConfig,
    "model.decoder.",
    (
        Row("embed_tokens.weight", "embed.embedding", ("vocabulary", "width")),
        Row("embed_positions.weight", "positions.embedding", (None, "width")),
        Row("project_in.weight", "project_in.kernel", (None, "width"), transpose=True),
        *linear("layers.{}.self_attn.q_proj", "layers.{}.query", ("width", "heads")),
        *linear("layers.{}.self_attn.k_proj", "layers.{}.key", ("width", "heads")),
        *linear("layers.{}.self_attn.v_proj", "layers.{}.value", ("width", "heads")),
        *linear("layers.{}.self_attn.out_proj", "layers.{}.out", ("heads", "width")),
        *norm("layers.{}.self_attn_layer_norm", "layers.{}.norm1"),
        *linear("layers.{}.fc1", "layers.{}.up", ("width", "feedforward")),
        *linear("layers.{}.fc2", "layers.{}.down", ("feedforward", "width")),
        *norm("layers.{}.final_layer_norm", "layers.{}.norm2"),
        *norm("final_layer_norm", "norm"),
        Row("project_out.weight", "project_out.kernel", ("width", None), transpose=True),
    ),
    class_prefix="OPT",
    ignored=r"version",
)
