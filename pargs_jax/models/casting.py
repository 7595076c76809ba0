"""Matrices in float32 that each layer converts to bfloat16 for itself.

A step in bfloat16 needs each matrix in bfloat16 while its layer is at work. Converting all of them first takes half of
the parameters' memory for the whole step. Here the loop over layers gets them as they are stored. The gradients are
bfloat16, in which they are computed: a derivative sees a loop that got matrices in bfloat16.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32

Params = dict[str, Any]


@partial(jax.tree_util.register_dataclass, data_fields=["stored", "stand_in"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """A matrix in float32, or a stack of them. `stand_in` gets the gradients; its values are not read."""

    stored: Float32[Array, "*L D E"]
    stand_in: BFloat16[Array, "*L D E"]


def is_stored(part: Any) -> bool:
    return isinstance(part, StoredMatrix)


def store_matrices(params: Params) -> Params:
    """The parameters of a model, with a `StoredMatrix` for each matrix in float32 of the stacked layers."""

    def stored(path: tuple[Any, ...], x: Array) -> Any:
        names = [getattr(part, "key", None) for part in path]
        if names[:2] != ["backbone", "layers"] or names[-1] != "kernel" or x.dtype != jnp.float32:
            return x
        return StoredMatrix(jax.lax.stop_gradient(x), jnp.zeros(x.shape, jnp.bfloat16))

    return jax.tree_util.tree_map_with_path(stored, params)


def converted(params: Any) -> Any:
    """Arrays in bfloat16 instead of each `StoredMatrix`."""
    return jax.tree.map(
        lambda part: _convert(part.stored, part.stand_in) if is_stored(part) else part, params, is_leaf=is_stored
    )


def gradients_of(gradients: Any) -> Any:
    """Gradients of the matrices themselves, of what `jax.grad` gives."""
    return jax.tree.map(lambda part: part.stand_in if is_stored(part) else part, gradients, is_leaf=is_stored)


@jax.custom_vjp
def _convert(stored: Float32[Array, "D E"], stand_in: BFloat16[Array, "D E"]) -> BFloat16[Array, "D E"]:
    # To the nearest, ties to even, as `astype` rounds. XLA for TPUs moves a conversion in front of the slicing of a
    # stack, and then out of the loop: it makes the very copy that is to be avoided. It leaves this arithmetic alone.
    bits = jax.lax.bitcast_convert_type(stored, jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    upper = jnp.where(jnp.isnan(stored), (bits >> 16) | 1, rounded)  # rounded up, a NaN could become a number
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


_convert.defvjp(lambda stored, stand_in: (_convert(stored, stand_in), None), lambda _, gradient: (None, gradient))
