"""ModernBERT (Warner et al., 2024): an encoder with rotary positions, gated feed-forwards, norms before each half of a
layer, and layers that see only a window on both sides between layers that see everything."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.attention import attend_whole
from pargs_jax.models.config_fields import ConfigFields, EvenHeads, activation, check_divides
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.family import Family
from pargs_jax.models.heads import NORMED_ENCODER_HEADS
from pargs_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    Linear,
    Remat,
    dropout,
    join_heads,
    layer_norm,
    make_layers,
    run_layers,
    split_heads,
)
from pargs_jax.models.rotary import Rotary, rotate
from pargs_jax.models.tables import Row, linear, norm
from pargs_jax.models.windows import FULL, SLIDING, Windows, windows_of_layers


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(EvenHeads):
    """The shape of a ModernBERT model; the defaults are those of the base size.

    `windows` has for each layer how far a token sees on either side, or None if it sees everything; such layers have
    the `rotary` rotation, the others the `local_rotary` one. `pooling` says what the head reads: the state of the first
    token, `[CLS]`, or the mean of all. `dropout` acts on embeddings and residual branches, and only when a key is
    given. `remat` is for training (see `run_layers`).
    """

    vocab_size: int = 50368
    context_length: int = 8192
    width: int = 768
    layers: int = 22
    heads: int = 12
    feedforward: int = 1152
    activation: str = "gelu"
    pooler_activation: str = "gelu"
    norm_epsilon: float = 1e-5
    rotary: Rotary = Rotary(theta=160000.0)  # noqa: RUF009 (frozen)
    local_rotary: Rotary = Rotary()  # noqa: RUF009
    windows: Windows = tuple(64 if index % 3 else None for index in range(22))
    pooling: Literal["cls", "mean"] = "cls"
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    pooler_bias: bool = False
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"

    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "global_attn_every_n_layers",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "feedforward": "intermediate_size",
            "activation": "hidden_activation",
            "norm_epsilon": "norm_eps",
            "attention_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "norm_bias": "norm_bias",
            "pooler_bias": "classifier_bias",
            "pooling": "classifier_pooling",
            "initializer_range": "initializer_range",
        },
        read=(
            "classifier_activation", "layer_types", "local_attention", "sliding_window", "rope_parameters",
            "rope_scaling", "global_rope_theta", "local_rope_theta",
        ),
        harmless=(
            "embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "tie_word_embeddings", "layer_norm_eps",
            "position_embedding_type",
            # Of the head that guesses masked words, and of other kernels.
            "decoder_bias", "sparse_prediction", "sparse_pred_ignore_index", "deterministic_flash_attn",
            "repad_logits_with_grad",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries, must have one for each of {self.layers} layers")

    @classmethod
    def from_hf(cls, hf: Any) -> "ModernBertConfig":
        """Reads a `transformers.ModernBertConfig`. Raises InputError for one that is invalid or not supported."""
        check_divides(hf, "num_attention_heads", "hidden_size")
        reach = hf.local_attention
        if not isinstance(reach, int) or reach < 2:
            raise InputError(f"local_attention is {reach!r}, must be a whole number of at least 2")
        head_dim = hf.hidden_size // hf.num_attention_heads
        rotaries = [Rotary.from_hf(hf.rope_parameters[kind], head_dim) for kind in (FULL, SLIDING)]
        if len(hf.layer_types) != hf.num_hidden_layers:
            raise InputError(f"layer_types has {len(hf.layer_types)} entries for {hf.num_hidden_layers} layers")
        return cls(
            rotary=rotaries[0],
            local_rotary=rotaries[1],
            windows=windows_of_layers(hf),
            pooler_activation=activation(hf, "classifier_activation"),
            **cls.HF_FIELDS.read_named(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.ModernBertConfig`."""
        kinds = [FULL if window is None else SLIDING for window in self.windows] or [FULL] * self.layers
        reach = next((window for window in self.windows if window is not None), None)
        return {
            "model_type": "modernbert",
            **self.HF_FIELDS.write_named(self),
            "classifier_activation": self.pooler_activation,
            "layer_types": kinds,
            "rope_parameters": {FULL: self.rotary.to_hf(), SLIDING: self.local_rotary.to_hf()},
            **({} if reach is None else {"local_attention": 2 * reach}),
        }

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "ModernBert":
        return ModernBert(self, unrolled=unrolled, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, config: ModernBertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        init = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int, bias: bool) -> Linear:
            return Linear(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)

        self.norm1 = layer_norm(width, config.norm_epsilon, rngs, bias=config.norm_bias)
        self.query, self.key, self.value, self.out = (linear(width, width, config.attention_bias) for _ in range(4))
        self.norm2 = layer_norm(width, config.norm_epsilon, rngs, bias=config.norm_bias)
        self.gate = linear(width, config.feedforward, config.mlp_bias)
        self.up = linear(width, config.feedforward, config.mlp_bias)
        self.down = linear(config.feedforward, width, config.mlp_bias)

    def attention(
        self,
        queries_of: Float[Array, "B T D"],
        x: Float[Array, "B S D"],
        turns: tuple[Any, Any],
        mask: Bool[Array, "B T S"],
    ) -> Float[Array, "B T D"]:
        """What tokens read of each other. `turns` are the rotations of the tokens that read and of those that are
        read."""
        heads = self.config.heads
        q = rotate(split_heads(self.query(queries_of), heads), turns[0])
        k = rotate(split_heads(self.key(x), heads), turns[1])
        mixed = attend_whole(q, k, split_heads(self.value(x), heads), mask, self.config.head_dim**-0.5)
        return self.out(join_heads(mixed))

    def feedforward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))


class ModernBert(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: ModernBertConfig, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width, config.initializer_range, rngs=rngs)
        self.embed_norm = layer_norm(config.width, config.norm_epsilon, rngs, bias=config.norm_bias)
        self.layers = make_layers(lambda rngs: Block(config, rngs=rngs), config.layers, unrolled, rngs)
        self.norm = layer_norm(config.width, config.norm_epsilon, rngs, bias=config.norm_bias)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        valid: Bool[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        only: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Final hidden states of whole texts. `mask[b, t, s]` says whether token t sees token s where no window says
        otherwise; segments make no difference. With `only`, T is 1: the result is the state at slot `only[b]` of each
        row, and unrolled layers skip the last layer's work for the other slots."""
        config = self.config
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        far, near = (
            rotary.cos_sin(positions, config.head_dim, config.context_length)
            for rotary in (config.rotary, config.local_rotary)
        )
        windows = config.windows or (None,) * config.layers
        sees_all = jnp.asarray([window is None for window in windows])
        reaches = jnp.asarray([window or 0 for window in windows])
        distances = jnp.abs(positions[:, :, None] - positions[:, None])

        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, only[:, None, None], axis=1)

        def step(block: Block, x: Array, index: Any, _: Any, key: Any) -> tuple[Array, None]:
            attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
            turns = jax.tree.map(lambda a, b: jnp.where(sees_all[index], a, b), far, near)
            sees = mask & (sees_all[index] | (distances <= reaches[index]))
            normed = jnp.where(index == 0, x, block.norm1(x))  # the embeddings are normed already
            readers, own_turns = normed, turns
            is_last = only is not None and isinstance(self.layers, nnx.List) and index == config.layers - 1
            if is_last:
                x, readers, sees, own_turns = pick(x), pick(normed), pick(sees), jax.tree.map(pick, turns)
            mixed = block.attention(readers, normed, (own_turns, turns), sees)
            x = x + dropout(mixed, config.dropout, attention_key)
            return x + dropout(block.feedforward(block.norm2(x)), config.dropout, mlp_key), None

        x = dropout(self.embed_norm(self.embed(tokens)), config.dropout, embed_key)
        x, _ = run_layers(self.layers, step, x, config.layers, key=layers_key, remat=config.remat)
        return self.norm(x if only is None or x.shape[1] == 1 else pick(x)), None


@dataclasses.dataclass(frozen=True)
class ModernBertModel(EncoderModel):
    """ModernBERT with its scalar head, which has a norm."""

    heads: ClassVar = NORMED_ENCODER_HEADS


FAMILY = Family(
    ModernBertModel,
    ModernBertConfig,
    "model.",
    (
        Row("embeddings.tok_embeddings.weight", "embed.embedding", ("vocabulary", "width")),
        *norm("embeddings.norm", "embed_norm"),
        *norm("layers.{}.attn_norm", "layers.{}.norm1"),
        *linear("layers.{}.attn.Wqkv", "layers.{}.query", ("width", "heads")),
        *linear("layers.{}.attn.Wqkv", "layers.{}.key", ("width", "heads")),
        *linear("layers.{}.attn.Wqkv", "layers.{}.value", ("width", "heads")),
        *linear("layers.{}.attn.Wo", "layers.{}.out", ("heads", "width")),
        *norm("layers.{}.mlp_norm", "layers.{}.norm2"),
        *linear("layers.{}.mlp.Wi", "layers.{}.gate", ("width", "feedforward")),
        *linear("layers.{}.mlp.Wi", "layers.{}.up", ("width", "feedforward")),
        *linear("layers.{}.mlp.Wo", "layers.{}.down", ("feedforward", "width")),
        *norm("final_norm", "norm"),
    ),
    class_prefix="ModernBert",
    ignored=r"decoder\.(weight|bias)",
    identities=r"layers\.0\.attn_norm\.(weight|bias)",
)
