"""The key-value cache of a growing batch of texts: B rows, each with its own length."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from pargs_jax.sharding import ROWS, constrain, row_shards, spec_of

SLOT_MULTIPLE = 64
"""Cache sizes are multiples of this many slots; GPUs and TPUs multiply odd sizes slowly."""

MAX_SLICES = 256
"""The most rows of a stacked cache that are written one by one; more would take too long to compile."""


class Cache(NamedTuple):
    """Keys and values of B rows: slot s of a row holds its token at position s, and slots `s < lengths[b]` are real.

    `kv` is `KeyValues[L B H S D]` for stacked layers, or a tuple of L `KeyValues[B H S D]` for unrolled ones. `tables`
    holds what a model computed once from its weights, in the same form (see `PrefixCausalModel`).
    """

    kv: Any
    lengths: Int[Array, "B"]
    tables: Any = None

    @property
    def slots(self) -> int:
        """S, the number of slots of each row."""
        return jax.tree.leaves(self.kv)[0].shape[-2]

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Which slots are real."""
        return jnp.arange(self.slots) < self.lengths[:, None]

    def append(self, pending: Any, counts: Int[Array, "B"]) -> "Cache":
        """Appends the first `counts[b]` of each row's T pending tokens, `[... B H T D]`.

        Each row needs T free slots. Slots written past the count are overwritten by the next tokens.
        """
        kv = jax.tree.map(lambda stored, new: write_rows(stored, new, self.lengths), self.kv, pending)
        return self._replace(kv=kv, lengths=self.lengths + counts)

    def append_one(self, pending: Any, counts: Int[Array, "B"], index: Int[Array, "B"] | None) -> "Cache":
        """Appends one of each row's T pending tokens, number `index[b]`, where `counts[b]` is 1; nothing where it is
        0."""
        if index is not None:
            pending = jax.tree.map(lambda new: _pick(new, index), pending)
        return self.append(pending, counts)

    def keep_one(self, counts: Int[Array, "B"], index: Int[Array, "B"] | None) -> "Cache":
        """Keeps one of the tokens written behind each row's end, number `index[b]`, where `counts[b]` is 1. It moves to
        the end; the others are overwritten by the next tokens. Where `counts[b]` is 0, nothing is kept."""
        kv = self.kv
        if index is not None:
            moved = jax.tree.map(lambda stored: _pick(stored, self.lengths + index), kv)
            kv = jax.tree.map(lambda stored, new: write_rows(stored, new, self.lengths), kv, moved)
        return self._replace(kv=kv, lengths=self.lengths + counts)

    def forget(self, counts: Int[Array, "B"]) -> "Cache":
        """Removes the last `counts[b]` tokens of each row; nothing is copied."""
        return self._replace(lengths=self.lengths - counts)


def with_slots(new: Any, slots: int) -> Any:
    """Pads the keys and values of prompts, `[... B H P D]`, to at least this many slots."""
    slots = -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE

    def pad(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, slots - x.shape[-2]), (0, 0)])
        return constrain(padded, ROWS, "tensor", None, None)

    return jax.tree.map(pad, new)


def write_rows(stored: Array, new: Array, places: Int[Array, "B"]) -> Array:
    """Writes `[... B H T D]` into `[... B H S D]`; row b is written from slot `places[b]` on."""
    new = new.astype(stored.dtype)
    if stored.ndim == 4 or len(places) > MAX_SLICES:
        write = jax.vmap(lambda row, tokens, place: jax.lax.dynamic_update_slice(row, tokens, (0, place, 0)))
        return (jax.vmap(write, (0, 0, None)) if stored.ndim == 5 else write)(stored, new, places)
    # Stacked layers: one slice update per row. With a single scatter for all rows, TPUs choose a layout of the cache in
    # which every layer's attention has to copy its part.

    def write_all(stored: Array, new: Array, places: Array) -> Array:
        for row in range(len(places)):
            stored = jax.lax.dynamic_update_slice(stored, new[:, row : row + 1], (0, row, 0, places[row], 0))
        return stored

    spec = spec_of(stored.shape, ROWS, "tensor", None, None)
    if spec is None:
        return write_all(stored, new, places)
    split = jax.shard_map(write_all, in_specs=(spec, spec, PartitionSpec(spec[1])), out_specs=spec, check_vma=False)
    return split(stored, new, places)


def _pick(stored: Array, slots: Int[Array, "B"]) -> Array:
    """One slot of each row, `[... B H 1 D]`."""
    return jnp.take_along_axis(stored, slots.reshape((1,) * (stored.ndim - 4) + (-1, 1, 1, 1)), axis=-2)


def take_rows(tree: Any, rows: Int[Array, "N"]) -> Any:
    """Takes rows of all arrays of a tree. Rows are the first dimension; in caches of stacked layers, the second."""
    return _map_rows(lambda x, axis: jnp.take(x, rows, axis=axis), tree)


def repeat_rows(tree: Any, count: int) -> Any:
    """Repeats every row `count` times; the copies are adjacent."""
    return _map_rows(lambda x, axis: jnp.repeat(x, count, axis=axis), tree)


def copy_rows(tree: Any, sources: Int[Array, "B n"]) -> Any:
    """Overwrites rows with copies of other rows, in place. The rows form B groups of n; place i of group b gets a copy
    of the group's row `sources[b, i]`. A row that is copied must itself stay: `sources[b, sources[b, i]] == sources[b,
    i]`.

    Only rows that change are written: one per group at a time.
    """
    count = sources.shape[1]
    is_copy = sources != jnp.arange(count)
    places = jnp.argsort(~is_copy, axis=1, stable=True)

    def copy_one(step: Int[Array, ""], tree: Any) -> Any:
        place = places[:, step]
        source = jnp.take_along_axis(sources, place[:, None], axis=1)[:, 0]
        place = jnp.where(step < is_copy.sum(axis=1), place, source)  # nothing left to copy: onto itself
        return _map_rows(lambda x, axis: _copy_row(x, axis, source, place), tree)

    return jax.lax.fori_loop(0, is_copy.sum(axis=1).max(), copy_one, tree)


def _copy_row(x: Array, axis: int, source: Int[Array, "B"], place: Int[Array, "B"]) -> Array:
    """In each of B groups of rows (dimension `axis`), row `source[b]` overwrites row `place[b]`."""
    groups, count = len(source), x.shape[axis] // len(source)
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)
    if axis == 0 or groups % shards or groups > MAX_SLICES:
        apart = x.reshape(*x.shape[:axis], groups, count, *x.shape[axis + 1 :])
        write = jax.vmap(lambda rows, source, place: rows.at[place].set(rows[source]))
        for _ in range(axis):
            write = jax.vmap(write, (0, None, None))
        return write(apart, source, place).reshape(x.shape)

    # Stacked layers: one slice update per group, as in `write_rows`.
    def write_all(x: Array, source: Array, place: Array) -> Array:
        for group in range(len(source)):
            row = jax.lax.dynamic_slice_in_dim(x, group * count + source[group], 1, axis)
            x = jax.lax.dynamic_update_slice_in_dim(x, row, group * count + place[group], axis)
        return x

    spec = spec_of(x.shape, ROWS, "tensor", None, None)
    if spec is None:
        return write_all(x, source, place)
    rows = PartitionSpec(spec[1])
    return jax.shard_map(write_all, in_specs=(spec, rows, rows), out_specs=spec, check_vma=False)(x, source, place)


def put_rows(tree: Any, new: Any, rows: Int[Array, "N"]) -> Any:
    """Replaces rows of all arrays of a tree: row n of `new` goes to `rows[n]`, or nowhere if there is no such row.
    Where one of two arrays is narrower, its missing columns are zero."""

    def put(x: Array, y: Array, axis: int) -> Array:
        shape = np.maximum(x.shape, y.shape)
        x, y = (_widen(each, (*shape[:axis], each.shape[axis], *shape[axis + 1 :])) for each in (x, y))
        return x.at[(slice(None),) * axis + (rows,)].set(y, mode="drop")

    return _map_rows(put, tree, new)


def _widen(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == tuple(shape) else jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, shape, strict=True)])


def split_rows(tree: Any) -> Any:
    """Requires the arrays of a tree to be split over the mesh by rows, and caches by heads too."""

    def of_node(node: Any) -> Any:
        if not _is_cache(node):
            return constrain(node, ROWS, *(None,) * (node.ndim - 1))
        kv = jax.tree.map(lambda x: constrain(x, ROWS, "tensor", None, None), node.kv)
        return node._replace(kv=kv, lengths=constrain(node.lengths, ROWS))

    return jax.tree.map(of_node, tree, is_leaf=_is_cache)


def _map_rows(function: Any, tree: Any, *others: Any) -> Any:
    """Maps a function over all arrays that have rows, with the dimension that counts them. A cache's `tables` have
    none."""

    def of_node(node: Any, *more: Any) -> Any:
        if not _is_cache(node):
            return function(node, *more, 0)
        kv = jax.tree.map(lambda x, *ys: function(x, *ys, x.ndim - 4), node.kv, *(other.kv for other in more))
        return node._replace(kv=kv, lengths=function(node.lengths, *(other.lengths for other in more), 0))

    return jax.tree.map(of_node, tree, *others, is_leaf=_is_cache)


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)
