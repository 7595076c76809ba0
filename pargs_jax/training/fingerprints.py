"""Fingerprints of arrays, by which a checkpoint that was altered on disk is recognised when it is read.

They are computed from the arrays where these are, on every device its part, so that no file is read for them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from pargs_jax.sharding import on_every_device

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(tree: Any) -> dict[str, UInt32[Array, ""]]:
    """A 32-bit number for every array of a tree, by its path. Arrays of 64-bit elements have none.

    It is the sum, modulo 2^32, of a hash of every element's bits and place, so it depends neither on the mesh nor on
    the order of additions. One element that differs always changes it, because the hash of a place can be inverted;
    differences of several cancel out with a chance of about 2^-32.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return _fingerprints({name: leaf for name, leaf in named.items() if leaf.dtype.itemsize in _WORDS})


@jax.jit
def _fingerprints(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return on_every_device({name: _fingerprint(x) for name, x in arrays.items()})


def _fingerprint(x: Array) -> UInt32[Array, ""]:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """Spreads numbers that are alike over all others; both steps can be inverted."""
    x = (x ^ x >> 16) * jnp.uint32(0x9E3779B1)
    return x ^ x >> 15
