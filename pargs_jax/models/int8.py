"""Weights in int8, for decoding: the matrices of the layers are rounded, each output channel with a scale of its own.

A step of decoding is bound by reading weights, and these take half the bytes of bfloat16. Products are computed in the
dtype of the activations, so only the weights are rounded (weight-only quantisation). Embeddings, heads, biases and
norms keep their dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pargs_jax.models.layers import Linear

MATRIX, SCALE = "kernel", "kernel_scale"
LARGEST = 127


def adapt(block: nnx.Module) -> None:
    """Gives a block's linear layers int8 matrices with scales. `block` may be a stack of blocks."""
    for linear in vars(block).values():
        if isinstance(linear, Linear):
            *stack, _, outputs = linear.kernel.shape
            linear.kernel = nnx.Param(jnp.zeros(linear.kernel.shape, jnp.int8))
            linear.kernel_scale = nnx.Param(jnp.ones((*stack, outputs)))


@partial(jax.jit, donate_argnums=0)
def quantise(kernel: Float[Array, "*L D E"]) -> tuple[Int[Array, "*L D E"], Float[Array, "*L E"]]:
    """A matrix in int8, and the scale of each output channel: `kernel` is their product, off by at most half a
    scale. A scale is NaN if a weight of its channel is not finite."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis=-2) / LARGEST, jnp.finfo(jnp.float32).tiny)
    scale = scale + (wide * 0).sum(axis=-2)  # NaN if a weight is not finite, which a maximum hides on CPUs
    rounded = jnp.round(wide / scale[..., None, :]).astype(jnp.int8)
    return rounded, scale.astype(kernel.dtype)


def quantise_layers(params: Any, function: Callable[[Any], tuple[Array, Array]] = quantise) -> Any:
    """A model's parameters with the matrices of its layers in int8; the arrays that are rounded are freed. `function`
    makes a matrix and its scale of what is there."""

    def inside(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if MATRIX not in part:
            return {name: inside(inner) for name, inner in part.items()}
        matrix, scale = function(part[MATRIX])
        return part | {MATRIX: matrix, SCALE: scale}

    backbone = params["backbone"]
    return params | {"backbone": backbone | {"layers": inside(backbone["layers"])}}
