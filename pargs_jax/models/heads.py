"""The heads that read a backbone's hidden states: next-token logits, one scalar reward for each state, or a table of
the rewards of all next tokens.

`CAUSAL_HEADS`, `ENCODER_HEADS` and `NORMED_ENCODER_HEADS` list the heads that models can have, by name. A new head is a
new entry there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pargs_jax.models.attention import soft_cap
from pargs_jax.models.layers import ACTIVATIONS, Embedding, Linear, layer_norm
from pargs_jax.models.tables import Row, linear, name_dimensions_of, norm

CLASSIFIER = "ForSequenceClassification"


@dataclasses.dataclass(frozen=True)
class Head:
    """One kind of head: its parameters, their first values, and how checkpoints store it.

    Attributes:
        make: `make(config, std, rngs)` makes its module. Its parameters lie below `head` in a model's parameters.
        outputs: how many numbers it computes per hidden state, given the model's config.
        rows: its tensors in checkpoints (which have no prefix), and the array below `head` that each becomes.
        class_suffix: the ending of the transformers class name of checkpoints that have it.
        may_be_new: whether a checkpoint may lack it. It then starts at random and is trained in full, even where the
            backbone only gets low-rank additions.
        may_be_tied: whether it is the token embeddings where the model's config says so.
        is_marked: whether `pargs_head` in config.json names it, because the tensors do not tell. is_fp32: whether its
            parameters stay fp32 where the backbone computes in another format.
        std: the standard deviation of its initial matrices, given the model's config; biases start at 0.
    """

    make: Callable[[Any, float, nnx.Rngs], nnx.Module]
    outputs: Callable[[Any], int]
    rows: tuple[Row, ...]
    class_suffix: str
    may_be_new: bool = False
    may_be_tied: bool = False
    is_marked: bool = False
    is_fp32: bool = False
    std: Callable[[Any], float] = lambda config: config.initializer_range

    def __post_init__(self) -> None:
        name_dimensions_of(self.rows, "head")

    def labels(self, config: Any) -> int | None:
        """`num_labels` in config.json; None where the transformers class has no labels."""
        return self.outputs(config) if self.class_suffix == CLASSIFIER else None


class VocabularyHead(nnx.Module):
    """Next-token logits in fp32, from the head's own matrix or, with tied embeddings, from the embedding table. `cap`
    limits them smoothly (`soft_cap`)."""

    def __init__(
        self, width: int, vocab_size: int, tied: bool, std: float, cap: float | None = None, *, rngs: nnx.Rngs
    ) -> None:
        normal = nnx.initializers.normal(std)
        self.cap = cap
        self.linear = None if tied else Linear(width, vocab_size, use_bias=False, kernel_init=normal, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"], embed: Embedding) -> Float[Array, "*B V"]:
        logits = embed.attend(hidden) if self.linear is None else self.linear(hidden)
        return soft_cap(logits.astype(jnp.float32), self.cap)


class RewardHead(nnx.Module):
    """One linear layer in fp32. Entry t is the reward of the text up to and including token t."""

    def __init__(self, width: int, std: float, *, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.linear = Linear(width, 1, use_bias=bias, kernel_init=nnx.initializers.normal(std), rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        return _fp32_linear(self.linear, hidden)[..., 0]


class PooledRewardHead(nnx.Module):
    """DeBERTa's pooler and classifier: a dense layer with its activation, then a linear layer to one number, in
    fp32."""

    def __init__(self, width: int, activation: str, std: float, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(std)
        self.activation = activation
        self.dense = Linear(width, width, kernel_init=normal, rngs=rngs)
        self.linear = Linear(width, 1, kernel_init=normal, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        pooled = ACTIVATIONS[self.activation](_fp32_linear(self.dense, hidden))
        return _fp32_linear(self.linear, pooled)[..., 0]


class NormedRewardHead(nnx.Module):
    """ModernBERT's head: a dense layer with its activation, a norm, then a linear layer to one number, in fp32."""

    def __init__(self, config: Any, std: float, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(std)
        self.activation = config.pooler_activation
        self.dense = Linear(config.width, config.width, use_bias=config.pooler_bias, kernel_init=normal, rngs=rngs)
        self.norm = layer_norm(config.width, config.norm_epsilon, rngs, bias=config.norm_bias)
        self.linear = Linear(config.width, 1, kernel_init=normal, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        pooled = self.norm(ACTIVATIONS[self.activation](_fp32_linear(self.dense, hidden)))
        return _fp32_linear(self.linear, pooled)[..., 0]


def _fp32_linear(linear: Linear, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """A linear layer at full fp32 precision. Accelerators multiply fp32 at a lower precision by default, and rewards
    are compared by small differences."""
    out = jnp.matmul(x.astype(jnp.float32), linear.kernel[...].astype(jnp.float32), precision="highest")
    return out if linear.bias is None else out + linear.bias[...].astype(jnp.float32)


_VOCABULARY = Head(
    lambda config, std, rngs: VocabularyHead(
        config.head_width, config.vocab_size, config.tied_embeddings, std, getattr(config, "logit_cap", None), rngs=rngs
    ),
    outputs=lambda config: config.vocab_size,
    rows=(Row("lm_head.weight", "linear.kernel", ("width", "vocabulary"), transpose=True),),
    class_suffix="ForCausalLM",
    may_be_tied=True,
)

_REWARD = Head(
    lambda config, std, rngs: RewardHead(config.head_width, std, rngs=rngs),
    outputs=lambda config: 1,
    rows=(Row("score.weight", "linear.kernel", ("width", "vocabulary"), transpose=True),),
    class_suffix=CLASSIFIER,
    may_be_new=True,
    is_fp32=True,
)

CAUSAL_HEADS: dict[str, Head] = {
    "vocabulary": _VOCABULARY,
    # The same parameters; the outputs are rewards of the text with each next token appended (FaRMA, CD-Q).
    "table": dataclasses.replace(_VOCABULARY, is_marked=True),
    "reward": _REWARD,
    # A reward head with a bias, as trl's value heads have. A checkpoint that has one gets it in place of `reward`.
    "value": dataclasses.replace(
        _REWARD,
        make=lambda config, std, rngs: RewardHead(config.head_width, std, bias=True, rngs=rngs),
        rows=linear("score", "linear", ("width", "vocabulary")),
    ),
}

ENCODER_HEADS: dict[str, Head] = {
    "reward": Head(
        lambda config, std, rngs: PooledRewardHead(config.width, config.pooler_activation, std, rngs=rngs),
        outputs=lambda config: 1,
        rows=(
            *linear("pooler.dense", "dense", ("width", None)),
            *linear("classifier", "linear", ("width", "vocabulary")),
        ),
        class_suffix=CLASSIFIER,
        may_be_new=True,
        is_fp32=True,
    ),
}

NORMED_ENCODER_HEADS: dict[str, Head] = {
    "reward": dataclasses.replace(
        ENCODER_HEADS["reward"],
        make=lambda config, std, rngs: NormedRewardHead(config, std, rngs=rngs),
        rows=(
            *linear("head.dense", "dense", ("width", None)),
            *norm("head.norm", "norm"),
            *linear("classifier", "linear", ("width", "vocabulary")),
        ),
    ),
}
