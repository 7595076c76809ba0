"""Fingerprints of arrays, by which a checkpoint that was altered on disk is recognised when it is read.

They are computed from the arrays where these are, of every device's part, so that no file is read for them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pargs_jax.processes import summed
from pargs_jax.sharding import on_every_device

_WORDS = {1: "uint8", 2: "uint16", 4: "uint32"}
_COLUMN, _ROW = np.uint32(0x2C1B3C6D), np.uint32(0x85EBCA6B)
"""Start the numbers of columns and of rows, so that they differ."""
_AT_ONCE = 2**18
"""Elements that a processor's cache holds."""


def fingerprints(tree: Any) -> dict[str, int]:
    """A 32-bit number for every array of a tree, by its path. Arrays of 64-bit elements have none. All processes must
    call this; it waits for the arrays.

    It is the sum, modulo 2^32, of every element's bits (folded, so that low bits vary in round numbers too) times an
    odd number for its row (all axes but the last) and an odd number for its column. So it depends neither on the mesh
    nor on the order of additions. One element that differs always changes it, because a fold and a product with an odd
    number can be inverted; random differences of several cancel out with a chance of about 2^-31.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    named = {name: leaf for name, leaf in named.items() if leaf.dtype.itemsize in _WORDS}
    if all(device.platform == "cpu" for leaf in named.values() for device in leaf.devices()):
        # XLA adds whole numbers one by one on CPUs, which takes seven times as long.
        numbers = summed(np.array([_of_own_parts(leaf) for leaf in named.values()], np.uint32))
        return dict(zip(named, numbers.tolist(), strict=True))
    return {name: int(mark) for name, mark in jax.device_get(fingerprints_on_devices(named)).items()}


@jax.jit
def fingerprints_on_devices(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """The same numbers, computed by the devices: these read an array as fast as their memory gives it."""
    return on_every_device({name: _of_whole(x) for name, x in arrays.items()})


def _of_whole(x: Array) -> UInt32[Array, ""]:
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    words ^= words >> 16
    place = jnp.zeros((), jnp.uint32)
    for axis in range(x.ndim - 1):
        stride = math.prod(x.shape[axis + 1 : -1]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    column = jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1) if x.ndim else place
    return jnp.sum(words * _odd(place ^ _ROW) * _odd(column ^ _COLUMN), dtype=jnp.uint32)


def _of_own_parts(x: Array) -> int:
    """What this process's devices add to an array's number; of parts that several devices have, one counts."""
    return sum(_of_part(part, x.shape) for part in x.addressable_shards if part.replica_id == 0) % 2**32


def _of_part(part: Any, shape: tuple[int, ...]) -> int:
    values = np.ascontiguousarray(part.data)  # on a CPU, this is the array itself
    if not shape:
        return _of_rows(values.reshape(1, 1), np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    *places, columns = (np.arange(*index.indices(size)) for index, size in zip(part.index, shape, strict=True))
    rows = np.zeros(1, np.int64)
    for numbers, size in zip(places, shape, strict=False):
        rows = (rows[:, None] * size + numbers).reshape(-1)
    return _of_rows(values.reshape(-1, values.shape[-1]), rows, columns)


def _of_rows(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> int:
    """The number of a matrix whose rows and columns have these places in the whole array."""
    row_factors, column_factors = (
        _odd(places.astype(np.uint32) ^ start) for places, start in ((rows, _ROW), (columns, _COLUMN))
    )
    all_words = values.view(_WORDS[values.dtype.itemsize])
    sums = np.empty(len(rows), np.uint32)
    count = max(1, _AT_ONCE // max(1, len(columns)))
    folded = np.empty((min(count, len(rows)), len(columns)), np.uint32)
    for first in range(0, len(rows), count):
        words = all_words[first : first + count]
        if words.itemsize == 4:
            high = np.right_shift(words, 16, out=folded[: len(words)])
            words = np.bitwise_xor(words, high, out=high)
        # einsum casts as it goes, and needs no second array.
        np.einsum("ij,j->i", words, column_factors, dtype=np.uint32, out=sums[first : first + count])
    return int(np.sum(sums * row_factors, dtype=np.uint32))


def _odd(x: Any) -> Any:
    """Spreads numbers that are alike over all odd numbers."""
    x = (x ^ x >> 16) * np.uint32(0x9E3779B1)
    x = (x ^ x >> 15) * np.uint32(0x85EBCA77)
    return (x ^ x >> 13) | np.uint32(1)
