"""What is read off a backbone's hidden states: next-token logits, or one scalar reward for each state."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pargs_jax.models.layers import ACTIVATIONS, Embedding, Linear


class VocabularyHead(nnx.Module):
    """Next-token logits in fp32, from the head's own matrix or, with tied embeddings, from the embedding table."""

    def __init__(self, width: int, vocab_size: int, tied: bool, std: float, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(std)
        self.linear = None if tied else Linear(width, vocab_size, use_bias=False, kernel_init=normal, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"], embed: Embedding) -> Float[Array, "*B V"]:
        logits = embed.attend(hidden) if self.linear is None else self.linear(hidden)
        return logits.astype(jnp.float32)


class RewardHead(nnx.Module):
    """One linear layer without bias, computed in fp32: the reward of the text up to and including each position."""

    def __init__(self, width: int, std: float, *, rngs: nnx.Rngs) -> None:
        self.linear = Linear(width, 1, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        return _fp32_linear(self.linear, hidden)[..., 0]


class PooledRewardHead(nnx.Module):
    """DeBERTa's pooler and classifier: a dense layer with its activation, then one number, computed in fp32."""

    def __init__(self, width: int, activation: str, std: float, *, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(std)
        self.activation = activation
        self.dense = Linear(width, width, kernel_init=normal, rngs=rngs)
        self.linear = Linear(width, 1, kernel_init=normal, rngs=rngs)

    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        pooled = ACTIVATIONS[self.activation](_fp32_linear(self.dense, hidden))
        return _fp32_linear(self.linear, pooled)[..., 0]


def _fp32_linear(linear: Linear, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """A linear layer in fp32: accelerators multiply fp32 in less by default, and rewards are compared by small
    differences."""
    out = jnp.matmul(x.astype(jnp.float32), linear.kernel[...].astype(jnp.float32), precision="highest")
    return out if linear.bias is None else out + linear.bias[...].astype(jnp.float32)
