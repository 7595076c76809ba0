"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023): heads that rotate in part, and attention and
feed-forward side by side."""

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
)
from pargs_jax.models.llama import rope_parameters
from pargs_jax.models.rotary import Rotary, rotate
from pargs_jax.models.tables import Row, linear, norm


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(EvenHeads):
    """The shape of a GPT-NeoX model.

    `parallel` says whether the feed-forward reads the layer's input, as attention does, or attention's output.
    `dropout` acts on embeddings and residual branches, and only when a key is given. `remat` is for training: see
    `run_layers`.
    """

    vocab_size: int = 50304
    context_length: int = 2048
    width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 3072
    activation: str = "gelu"
    norm_epsilon: float = 1e-5
    rotary: Rotary = Rotary(share=0.25)  # noqa: RUF009 (frozen)
    parallel: bool = True
    attention_bias: bool = True
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "feedforward": "intermediate_size",
            "activation": "hidden_act",
            "norm_epsilon": "layer_norm_eps",
            "parallel": "use_parallel_residual",
            "attention_bias": "attention_bias",
            "tied_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
        },
        read=(
            "rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor",
            "original_max_position_embeddings",
        ),
        must=CAUSAL,
    )  # fmt: skip

    @property
    def max_positions(self) -> int:
        return self.rotary.reach(self.context_length)

    @classmethod
    def from_hf(cls, hf: Any) -> "GPTNeoXConfig":
        """Reads a `transformers.GPTNeoXConfig`. Raises InputError for one that is invalid or not supported."""
        check_divides(hf, "num_attention_heads", "hidden_size")
        head_dim = hf.hidden_size // hf.num_attention_heads
        rotary = Rotary.from_hf(rope_parameters(hf), head_dim, may_be_partial=True)
        return cls(rotary=rotary, **cls.HF_FIELDS.read_named(hf))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.GPTNeoXConfig`."""
        # Without a share, transformers takes a quarter.
        rotary = {**self.rotary.to_hf(), "partial_rotary_factor": self.rotary.share}
        return {"model_type": "gpt_neox", "rope_parameters": rotary, **self.HF_FIELDS.write_named(self)}

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "GPTNeoX":
        return GPTNeoX(self, unrolled=unrolled, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        normal = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int, bias: bool = True) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, kernel_init=normal, rngs=rngs)

        self.norm1 = layer_norm(width, config.norm_epsilon, rngs)
        self.query_key_value = linear(width, 3 * width, config.attention_bias)
        self.out = linear(width, width, config.attention_bias)
        self.norm2 = layer_norm(width, config.norm_epsilon, rngs)
        self.up = linear(width, config.feedforward)
        self.down = linear(config.feedforward, width)

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
        # The columns of the joined matrix are ordered by head, so that a mesh splits them by heads.
        joined = self.query_key_value(self.norm1(x)).reshape(*x.shape[:2], config.heads, 3, config.head_dim)
        q, k, v = joined.transpose(3, 0, 2, 1, 4)
        new = KeyValues(rotate(k, cos_sin), v)
        mixed, kv = attend(rotate(q, cos_sin), new, sight, cached, config.head_dim**-0.5)
        after = x + dropout(self.out(mixed), config.dropout, attention_key)
        hidden = ACTIVATIONS[config.activation](self.up(self.norm2(x if config.parallel else after)))
        return after + dropout(self.down(hidden), config.dropout, mlp_key), kv


class GPTNeoX(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: GPTNeoXConfig, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.initializer_range, rngs=rngs)
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
        x = dropout(self.embed(tokens), self.config.dropout, embed_key)
        cos_sin = self.config.rotary.cos_sin(positions, self.config.head_dim, self.config.context_length)

        def step(block: Block, x: Array, index: Any, kv: KeyValues | None, key: Any) -> tuple[Array, KeyValues]:
            return block(x, cos_sin, sight, kv, key)

        x, new = run_layers(self.layers, step, x, self.config.layers, cache, layers_key, remat=self.config.remat)
        return self.norm(x), new


FAMILY = Family(
    CausalModel,
    GPTNeoXConfig,
    "gpt_neox.",
    (
        Row("embed_in.weight", "embed.embedding", ("vocabulary", "width")),
        *norm("layers.{}.input_layernorm", "layers.{}.norm1"),
        *linear("layers.{}.attention.query_key_value", "layers.{}.query_key_value", ("width", "heads")),
        *linear("layers.{}.attention.dense", "layers.{}.out", ("heads", "width")),
        *norm("layers.{}.post_attention_layernorm", "layers.{}.norm2"),
        *linear("layers.{}.mlp.dense_h_to_4h", "layers.{}.up", ("width", "feedforward")),
        *linear("layers.{}.mlp.dense_4h_to_h", "layers.{}.down", ("feedforward", "width")),
        *norm("final_layer_norm", "norm"),
    ),
    class_prefix="GPTNeoX",
    head_names={"lm_head.weight": "embed_out.weight"},
    ignored=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)
