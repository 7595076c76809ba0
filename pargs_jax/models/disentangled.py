"""Scores of disentangled attention (He et al., 2021): contents with contents, contents with relative positions.

Positions are rows of a small table. What meets which row is a matter of distance alone, so that scores are products
with a run of rows, shifted into place. Only among a few new tokens (`pick_scores`) are elements gathered one by one,
which accelerators are slow at.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pargs_jax.models.layers import KeyValues

MINIMUM = float(jnp.finfo(jnp.float32).min)
"""The score of what is not to be seen; finite, so that a row which sees nothing is not NaN."""

BLOCK = 64
"""Slots of a cache whose keys meet one run of positions together; caches of a multiple of this many are cut so."""


class PositionTable(NamedTuple):
    """One layer's projections of relative positions: what queries meet, and what keys meet; None where not used."""

    keys: Float[Array, "H N D"] | None
    queries: Float[Array, "H N D"] | None

    def at(self, rows: Int[np.ndarray, "N"]) -> "PositionTable":
        return PositionTable(*(None if table is None else table[:, rows] for table in self))


class CachedLayer(NamedTuple):
    """What one layer keeps of texts already read."""

    kv: KeyValues
    table: PositionTable


def position_scores_by_distance(
    queries: Float[Array, "B H T D"], keys: Float[Array, "B H T D"], table: PositionTable
) -> Float[Array, "B H T T"] | float:
    """Scores of contents with positions in a whole text; `table` has a row for each distance 1 - T .. T - 1."""
    scores: Any = 0.0
    if table.keys is not None:
        met = jnp.einsum("bhqd,hnd->bhqn", queries, table.keys[:, ::-1], preferred_element_type=jnp.float32)
        scores = scores + _skew(met)
    if table.queries is not None:
        met = jnp.einsum("bhkd,hnd->bhkn", keys, table.queries, preferred_element_type=jnp.float32)
        scores = scores + _skew(met).swapaxes(-1, -2)
    return scores


def cached_scores(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H S D"],
    offsets: Int[Array, "B T"],
    end: Int[Array, "B"],
    rows: Callable[[Int[Array, "*B"]], Int[Array, "*B"]],
    table: PositionTable,
) -> Float[Array, "B H T S"]:
    """All scores of new tokens with a cache's slots, from which they are `end + offsets - s` away.

    A block of slots meets the rows of the distances that there are between it and any of T offsets: few, where all
    distances are many. `rows` gives the row of the table for each distance.
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys, preferred_element_type=jnp.float32)
    batch, heads, count, slots = scores.shape
    block = BLOCK if slots % BLOCK == 0 else slots
    last = jnp.arange(block - 1, slots, block)
    band = rows(end[:, None, None] - last[:, None] + jnp.arange(block + count - 1))
    if table.keys is not None:
        met = jnp.einsum("bhtd,hbnwd->bhtnw", queries, table.keys[:, band], preferred_element_type=jnp.float32)
        met = _shift_left(met, offsets[:, None, :, None, None], count - 1)
        scores = scores + met[..., :block][..., ::-1].reshape(scores.shape)
    if table.queries is not None:
        blocks = keys.reshape(batch, heads, -1, block, keys.shape[-1])
        met = jnp.einsum("bhncd,hbnwd->bhncw", blocks, table.queries[:, band], preferred_element_type=jnp.float32)
        by_offset = _skew(met).reshape(batch, heads, slots, count).swapaxes(-1, -2)
        scores = scores + jnp.take_along_axis(by_offset, offsets[:, None, :, None], axis=2)
    return scores


def pick_scores(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H S D"],
    rows: Int[Array, "B T S"],
    table: PositionTable,
) -> Float[Array, "B H T S"]:
    """All scores of queries with keys at any distances: `rows` of the table. For few of either."""
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys, preferred_element_type=jnp.float32)
    if queries.shape[2] == 1:
        if table.keys is not None:
            picked = table.keys[:, rows]
            scores = scores + jnp.einsum("bhtd,hbtsd->bhts", queries, picked, preferred_element_type=jnp.float32)
        if table.queries is not None:
            picked = table.queries[:, rows].swapaxes(0, 1)
            scores = scores + (keys[:, :, None] * picked).sum(axis=-1, dtype=jnp.float32)
        return scores
    if table.keys is not None:
        met = jnp.einsum("bhtd,hnd->bhtn", queries, table.keys, preferred_element_type=jnp.float32)
        scores = scores + jnp.take_along_axis(met, rows[:, None], axis=-1)
    if table.queries is not None:
        met = jnp.einsum("bhsd,hnd->bhsn", keys, table.queries, preferred_element_type=jnp.float32)
        scores = scores + jnp.take_along_axis(met, rows.swapaxes(1, 2)[:, None], axis=-1).swapaxes(-1, -2)
    return scores


def _skew(x: Float[Array, "*B T N"]) -> Float[Array, "*B T S"]:
    """Entry (t, s) of the result is entry (t, s - t + T - 1) of x, for S = N - T + 1 columns (Dai et al., 2019)."""
    *batch, length, columns = x.shape
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*batch, length * (columns + 1))
    flat = flat[..., length - 1 : length - 1 + length * columns]
    return flat.reshape(*batch, length, columns)[..., : columns - length + 1]


def _shift_left(x: Float[Array, "*B N"], by: Int[Array, "*B 1"], most: int) -> Float[Array, "*B N"]:
    """Moves each row's entries `by` places to the left, at most so many; in as many passes as that has bits."""
    for bit in range(most.bit_length()):
        moved = jnp.pad(x[..., 1 << bit :], [(0, 0)] * (x.ndim - 1) + [(0, 1 << bit)])
        x = jnp.where(by >> bit & 1, moved, x)
    return x
