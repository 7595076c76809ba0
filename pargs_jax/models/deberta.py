"""DeBERTa v2 and v3 (He et al., 2021): an encoder with disentangled attention, `content to content + content to
position + position to content`, over log-bucketed relative positions."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pargs_jax.errors import InputError
from pargs_jax.models.config_fields import ConfigFields, EvenHeads, activation, check_divides, whole_number
from pargs_jax.models.disentangled import (
    MINIMUM,
    CachedLayer,
    PositionTable,
    attend_by_distance,
    cached_scores,
    mix,
    pick_scores,
)
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.family import Family
from pargs_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    KeyValues,
    Linear,
    Remat,
    dropout,
    layer_norm,
    make_layers,
    run_layers,
    split_heads,
)
from pargs_jax.models.model import HeadName
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.models.tables import Row, linear, norm

LONGEST_TEXT = 2**30
"""The most tokens of a text whose positions are only relative."""


@dataclasses.dataclass(frozen=True)
class DebertaConfig(EvenHeads):
    """The shape of a DeBERTa v2 or v3 model; the defaults are those of v3-base.

    `dropout` acts on embeddings and residual branches, and only when a key is given. `remat` is for training (see
    `run_layers`). `attention` is not part of the published architecture (see `PrefixCausalModel`).
    """

    vocab_size: int = 128100
    context_length: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    feedforward: int = 3072
    embedding_width: int | None = None
    activation: str = "gelu"
    pooler_activation: str = "gelu"
    norm_epsilon: float = 1e-7
    relative_attention: bool = True
    position_buckets: int = 256
    max_relative_positions: int = 512
    content_to_position: bool = True
    position_to_content: bool = True
    share_attention_key: bool = True
    normalise_positions: bool = True
    absolute_positions: bool = False
    segments: int = 0
    convolution_width: int = 0
    convolution_groups: int = 1
    convolution_activation: str = "tanh"
    initializer_range: float = 0.02
    dropout: float = 0.0
    remat: Remat = "none"
    attention: Literal["full", "prefix_causal"] = "full"

    pooling: ClassVar[str] = "cls"
    HF_FIELDS: ClassVar[ConfigFields] = ConfigFields(
        sizes=(
            "vocab_size", "max_position_embeddings", "hidden_size", "embedding_size", "num_hidden_layers",
            "num_attention_heads", "attention_head_size", "intermediate_size", "pooler_hidden_size",
        ),
        names={
            "vocab_size": "vocab_size",
            "context_length": "max_position_embeddings",
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "feedforward": "intermediate_size",
            "activation": "hidden_act",
            "pooler_activation": "pooler_hidden_act",
            "norm_epsilon": "layer_norm_eps",
            "relative_attention": "relative_attention",
            "absolute_positions": "position_biased_input",
            "initializer_range": "initializer_range",
        },
        read=(
            "type_vocab_size", "position_buckets", "max_relative_positions", "pos_att_type", "share_att_key",
            "norm_rel_ebd", "conv_kernel_size", "conv_groups", "conv_act",
        ),
        harmless=(
            "pooler_dropout", "cls_dropout", "legacy", "tie_word_embeddings", "padding_idx", "position_embedding_type",
        ),
    )  # fmt: skip

    @property
    def max_positions(self) -> int:
        """Only a table of absolute positions ends; relative ones go on, also beyond the length that was trained."""
        return self.context_length if self.absolute_positions else LONGEST_TEXT

    @property
    def span(self) -> int:
        """The number of distances, or buckets of distances, on each side; the position table has twice as many rows."""
        return self.position_buckets if self.position_buckets > 0 else self.max_relative_positions

    @classmethod
    def from_hf(cls, hf: Any) -> "DebertaConfig":
        """Reads a `transformers.DebertaV2Config`. Raises InputError for one that is invalid or not supported."""
        _check_sizes(hf)
        types = hf.pos_att_type or ()
        farthest = hf.max_relative_positions
        attention = getattr(hf, "pargs_attention", "full")
        if attention not in ("full", "prefix_causal"):
            raise InputError(f"pargs_attention is {attention!r}, must be 'full' or 'prefix_causal'")
        norms = getattr(hf, "norm_rel_ebd", "none")
        if not isinstance(norms, str):
            raise InputError(f"norm_rel_ebd is {norms!r}, must be 'layer_norm' or 'none'")
        convolution = max(0, whole_number(hf, "conv_kernel_size", 0))
        return cls(
            embedding_width=getattr(hf, "embedding_size", None),
            position_buckets=whole_number(hf, "position_buckets", -1),
            max_relative_positions=farthest if farthest > 0 else hf.max_position_embeddings,
            content_to_position="c2p" in types,
            position_to_content="p2c" in types,
            share_attention_key=bool(getattr(hf, "share_att_key", False)),
            normalise_positions="layer_norm" in [name.strip() for name in norms.lower().split("|")],
            segments=max(0, hf.type_vocab_size),
            convolution_width=convolution,
            convolution_groups=getattr(hf, "conv_groups", 1) if convolution else 1,
            convolution_activation=activation(hf, "conv_act", "tanh") if convolution else "tanh",
            attention=attention,
            **cls.HF_FIELDS.read_named(hf),
        )

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `transformers.DebertaV2Config`."""
        fields = {
            "model_type": "deberta-v2",
            **self.HF_FIELDS.write_named(self),
            "pooler_hidden_size": self.width,
            "position_buckets": self.position_buckets,
            "max_relative_positions": self.max_relative_positions,
            "pos_att_type": ["c2p"] * self.content_to_position + ["p2c"] * self.position_to_content,
            "share_att_key": self.share_attention_key,
            "norm_rel_ebd": "layer_norm" if self.normalise_positions else "none",
            "type_vocab_size": self.segments,
            "pargs_attention": self.attention,
        }
        if self.embedding_width is not None:
            fields["embedding_size"] = self.embedding_width
        if self.convolution_width:
            fields["conv_kernel_size"] = self.convolution_width
            fields["conv_groups"] = self.convolution_groups
            fields["conv_act"] = self.convolution_activation
        return fields

    def make(self, *, unrolled: bool, rngs: nnx.Rngs) -> "Deberta":
        return Deberta(self, unrolled=unrolled, rngs=rngs)


def _check_sizes(hf: Any) -> None:
    """Raises InputError for sizes that do not fit together."""
    check_divides(hf, "num_attention_heads", "hidden_size")
    sizes = {"attention_head_size": hf.hidden_size // hf.num_attention_heads, "pooler_hidden_size": hf.hidden_size}
    for name, size in sizes.items():
        if getattr(hf, name, size) != size:
            raise InputError(f"{name} is {getattr(hf, name)!r}, must be {size} as hidden_size is {hf.hidden_size}")
    if hf.type_vocab_size == 1:
        raise InputError(
            "type_vocab_size is 1, which leaves no row for the second text of a pair; must be 0, or 2 or more"
        )
    buckets, farthest = whole_number(hf, "position_buckets", -1), hf.max_relative_positions
    farthest = farthest if farthest > 0 else hf.max_position_embeddings
    if hf.relative_attention and buckets > 0 and not 1 <= buckets // 2 < farthest - 1:
        raise InputError(
            f"position_buckets is {buckets} with distances up to {farthest}; must be at least 2, and half of "
            "them less than the longest distance"
        )
    width = whole_number(hf, "conv_kernel_size", 0)
    if width > 0:
        groups = whole_number(hf, "conv_groups", 1)
        if width % 2 == 0:
            raise InputError(f"conv_kernel_size is {width}, must be odd, so that a text keeps its length")
        if groups < 1 or hf.hidden_size % groups:
            raise InputError(f"conv_groups {groups} does not divide hidden_size {hf.hidden_size}")


def position_rows(config: DebertaConfig, distances: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
    """The row of the position table for each distance (the query's slot minus the key's slot).

    Distances below half the number of buckets have their own rows. Larger ones share rows, in steps that grow with the
    logarithm of the distance. Rounding is done in float32, as when the checkpoints were trained.
    """
    if config.relative_attention and config.position_buckets > 0:
        middle = config.position_buckets // 2
        far = np.maximum(np.abs(distances), middle).astype(np.float32)
        ratio = np.log(far / np.float32(middle)) / np.log(np.float32((config.max_relative_positions - 1) / middle))
        buckets = np.ceil(ratio * np.float32(middle - 1)).astype(np.int64) + middle
        distances = np.where(np.abs(distances) <= middle, distances, np.sign(distances) * buckets)
    return np.clip(distances + config.span, 0, 2 * config.span - 1)


class Block(nnx.Module):
    """A post-norm block."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        init = nnx.initializers.normal(config.initializer_range)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        own_positions = config.relative_attention and not config.share_attention_key
        self.position_key = linear(width, width) if own_positions and config.content_to_position else None
        self.position_query = linear(width, width) if own_positions and config.position_to_content else None
        self.out = linear(width, width)
        self.norm1 = layer_norm(width, config.norm_epsilon, rngs)
        self.up = linear(width, config.feedforward)
        self.down = linear(config.feedforward, width)
        self.norm2 = layer_norm(width, config.norm_epsilon, rngs)

    def positions(self, embedded: Float[Array, "N D"] | None) -> PositionTable:
        """Projects embedded relative positions into the form that this layer's attention needs."""
        if embedded is None:
            return PositionTable(None, None)
        config = self.config
        key, query = (self.key, self.query) if config.share_attention_key else (self.position_key, self.position_query)

        def project(linear: Linear, used: bool) -> Float[Array, "H N D"] | None:
            return split_heads(linear(embedded)[None], config.heads)[0] if used else None

        return PositionTable(project(key, config.content_to_position), project(query, config.position_to_content))

    def project(
        self, queries_of: Float[Array, "B T D"], x: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B H T D"], KeyValues]:
        heads = self.config.heads
        kv = KeyValues(split_heads(self.key(x), heads), split_heads(self.value(x), heads))
        return split_heads(self.query(queries_of), heads), kv

    def finish(
        self, x: Float[Array, "B T D"], mixed: Float[Array, "B H T D"], key: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        """The rest of the block after attention: output projection and feed-forward, each with its residual and
        norm."""
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        rate = self.config.dropout
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        x = self.norm1(x + dropout(self.out(mixed), rate, attention_key))
        hidden = ACTIVATIONS[self.config.activation](self.up(x))
        return self.norm2(x + dropout(self.down(hidden), rate, mlp_key))

    @property
    def scale(self) -> float:
        config = self.config
        return (config.head_dim * (1 + config.content_to_position + config.position_to_content)) ** -0.5


class Convolution(nnx.Module):
    """Mixes neighbouring embeddings into the first layer's output (v2-xlarge and larger)."""

    def __init__(self, config: DebertaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.conv = nnx.Conv(
            config.width,
            config.width,
            (config.convolution_width,),
            padding=[((config.convolution_width - 1) // 2,) * 2],
            feature_group_count=config.convolution_groups,
            rngs=rngs,
        )
        self.norm = layer_norm(config.width, config.norm_epsilon, rngs)

    def __call__(
        self, embedded: Float[Array, "B T D"], x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        mixed = jnp.where(valid[..., None], self.conv(embedded), 0)
        return self.norm(x + ACTIVATIONS[self.config.convolution_activation](mixed)) * valid[..., None]


class Deberta(nnx.Module):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: DebertaConfig, *, unrolled: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        width, std = config.width, config.initializer_range
        inner = config.embedding_width or width

        def embedding(count: int, size: int) -> Embedding | None:
            return Embedding(count, size, std, rngs=rngs) if count else None

        self.embed = embedding(config.vocab_size, inner)
        self.positions = embedding(config.context_length * config.absolute_positions, inner)
        self.segments = embedding(config.segments, inner)
        init = nnx.initializers.normal(std)
        projects = inner != width
        self.embed_out = Linear(inner, width, use_bias=False, kernel_init=init, rngs=rngs) if projects else None
        self.embed_norm = layer_norm(width, config.norm_epsilon, rngs)
        self.relative = embedding(2 * config.span * config.relative_attention, width)
        self.relative_norm = layer_norm(width, config.norm_epsilon, rngs) if config.normalise_positions else None
        self.layers = make_layers(lambda rngs: Block(config, rngs=rngs), config.layers, unrolled, rngs)
        self.convolution = Convolution(config, rngs=rngs) if config.convolution_width else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        valid: Bool[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        keep: bool = False,
        only: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states of whole texts and, with `keep`, each layer's `CachedLayer`.

        `mask[b, t, s]` says whether token t sees token s; distances are between slots. With `only`, T is 1: the result
        is the state at slot `only[b]` of each row, and unrolled layers skip the last layer's work for the other slots.
        """
        embed_key, layers_key = (None, None) if key is None else jax.random.split(key)
        embedded = self._embed(tokens, positions, segments)
        embedded = dropout(embedded * valid[..., None].astype(embedded.dtype), self.config.dropout, embed_key)
        length = tokens.shape[1]
        rows = position_rows(self.config, np.arange(1 - length, length))
        relative = self._relative()
        # The table has one row per distance. Short texts need few of them, so it is cheaper to pick rows before
        # projecting.
        if relative is not None and not keep and len(rows) < relative.shape[0]:
            relative, rows = relative[rows], np.arange(len(rows))

        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, only[:, None, None], axis=1)

        def step(block: Block, x: Array, index: Any, _: Any, key: Any) -> tuple[Array, CachedLayer | None]:
            table = block.positions(relative)
            is_unrolled = isinstance(self.layers, nnx.List)
            if only is not None and is_unrolled and 0 < index == self.config.layers - 1:
                queries_of = pick(x)
                rows_from_here = jnp.asarray(rows)[only[:, None] - np.arange(length) + length - 1]
                q, kv = block.project(queries_of, x)
                scores = pick_scores(q, kv.keys, rows_from_here[:, None], table)
                mixed = mix(scores, kv.values, pick(mask), block.scale)
            else:
                queries_of = x
                q, kv = block.project(x, x)
                mixed = attend_by_distance(q, kv.keys, kv.values, table.at(rows), mask, block.scale)
            x = block.finish(queries_of, mixed, key)
            if self.convolution is not None and x.shape[1] == length:
                x = jax.lax.cond(index == 0, lambda x: self.convolution(embedded, x, valid), lambda x: x, x)
            return x, CachedLayer(kv, table) if keep else None

        config = self.config
        x, cached = run_layers(self.layers, step, embedded, config.layers, key=layers_key, remat=config.remat)
        return x if only is None or x.shape[1] == 1 else pick(x), cached

    def extend(
        self,
        tokens: Int[Array, "B T"],
        offsets: Int[Array, "B T"],
        mask: Bool[Array, "*B T T"],
        cache: Any,
        end: Int[Array, "B"],
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of new tokens that see a cache and, by `mask`, each other; and their keys and values.

        `cache` holds `CachedLayer`s in the form that `run_layers` takes; its slots `s < end[b]` are real. New token t
        stands `offsets[b, t]` slots after the end; offsets are less than T.
        """
        count = tokens.shape[1]
        slots = jnp.arange(jax.tree.leaves(cache)[0].shape[-2])
        valid = slots < end[:, None]
        reach = len(slots) + count
        rows_of = jnp.asarray(position_rows(self.config, np.arange(-reach, reach + 1)))

        def rows(distances: Int[Array, "*B"]) -> Int[Array, "*B"]:
            return rows_of[jnp.clip(distances, -reach, reach) + reach]

        near = position_rows(self.config, np.arange(1 - count, count))
        own_rows = offsets[:, :, None] - offsets[:, None] + count - 1
        own_mask = jnp.broadcast_to(mask, (*tokens.shape, count))[:, None]

        def step(block: Block, x: Array, _: Any, layer: CachedLayer, key: Any) -> tuple[Array, KeyValues]:
            q, kv = block.project(x, x)
            past = cached_scores(q, layer.kv.keys, offsets, end, rows, layer.table)
            own = pick_scores(q, kv.keys, own_rows, layer.table.at(near))
            past = jnp.where(valid[:, None, None], past * block.scale, MINIMUM)
            own = jnp.where(own_mask, own * block.scale, MINIMUM)
            weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1), axis=-1).astype(kv.values.dtype)
            split = past.shape[-1]
            mixed = jnp.einsum("bhqk,bhkd->bhqd", weights[..., :split], layer.kv.values)
            mixed = mixed + jnp.einsum("bhqk,bhkd->bhqd", weights[..., split:], kv.values)
            return block.finish(x, mixed, key), kv

        embedded = self._embed(tokens, end[:, None] + offsets, segments)
        return run_layers(self.layers, step, embedded, self.config.layers, cache)

    def _embed(self, tokens: Array, positions: Array, segments: Array | None) -> Float[Array, "B T D"]:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.segments is not None:
            x = x + self.segments(jnp.zeros_like(tokens) if segments is None else segments)
        return self.embed_norm(x if self.embed_out is None else self.embed_out(x))

    def _relative(self) -> Float[Array, "N D"] | None:
        if self.relative is None:
            return None
        table = self.relative.embedding[...]
        return table if self.relative_norm is None else self.relative_norm(table)


def _model(config: DebertaConfig, head: HeadName) -> EncoderModel | PrefixCausalModel:
    kind = {"full": EncoderModel, "prefix_causal": PrefixCausalModel}[config.attention]
    return kind(config, head)


FAMILY = Family(
    _model,
    DebertaConfig,
    "deberta.",
    (
        Row("embeddings.word_embeddings.weight", "embed.embedding", ("vocabulary", "width")),
        Row("embeddings.position_embeddings.weight", "positions.embedding", (None, "width")),
        Row("embeddings.token_type_embeddings.weight", "segments.embedding", (None, "width")),
        Row("embeddings.embed_proj.weight", "embed_out.kernel", (None, "width"), transpose=True),
        *norm("embeddings.LayerNorm", "embed_norm"),
        Row("encoder.rel_embeddings.weight", "relative.embedding", (None, "width")),
        *norm("encoder.LayerNorm", "relative_norm"),
        *linear("encoder.conv.conv", "convolution.conv", (None, None, "width")),
        *norm("encoder.conv.LayerNorm", "convolution.norm"),
        *linear("encoder.layer.{}.attention.self.query_proj", "layers.{}.query", ("width", "heads")),
        *linear("encoder.layer.{}.attention.self.key_proj", "layers.{}.key", ("width", "heads")),
        *linear("encoder.layer.{}.attention.self.value_proj", "layers.{}.value", ("width", "heads")),
        *linear("encoder.layer.{}.attention.self.pos_key_proj", "layers.{}.position_key", ("width", "heads")),
        *linear("encoder.layer.{}.attention.self.pos_query_proj", "layers.{}.position_query", ("width", "heads")),
        *linear("encoder.layer.{}.attention.output.dense", "layers.{}.out", ("heads", "width")),
        *norm("encoder.layer.{}.attention.output.LayerNorm", "layers.{}.norm1"),
        *linear("encoder.layer.{}.intermediate.dense", "layers.{}.up", ("width", "feedforward")),
        *linear("encoder.layer.{}.output.dense", "layers.{}.down", ("feedforward", "width")),
        *norm("encoder.layer.{}.output.LayerNorm", "layers.{}.norm2"),
    ),
    class_prefix="DebertaV2",
    ignored=r"embeddings\.(position_ids|position_embeddings\.weight)|(lm_predictions|mask_predictions|cls)\..*",
)
