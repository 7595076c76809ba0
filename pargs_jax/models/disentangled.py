"""Attention scores of disentangled attention (He et al., 2021): content with content, and content with relative
positions.

Positions are rows of a small table. Which row applies depends only on the distance, so scores are products with a
contiguous run of rows, shifted into place. Gathering single elements is slow on accelerators; only `pick_scores` does
it, for a few new tokens.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.models.layers import KeyValues
from pargs_jax.sharding import current_device

Form = Literal["plain", "kernel"]

MINIMUM = float(jnp.finfo(jnp.float32).min)
"""The score of invisible slots; finite, so that a row that sees nothing does not become NaN."""

BLOCK = 64
"""Cache slots whose keys are multiplied with one run of positions; caches of a multiple of this size are split so."""

SHORTEST, LONGEST = 128, 2048
"""Tokens of the texts that the kernel for TPUs is used for: shorter ones are mostly padding; of longer ones, a head's
gradients with respect to positions do not fit the memory of a core."""

WIDEST_HEAD = 128


class PositionTable(NamedTuple):
    """One layer's projected relative positions, used by queries (`keys`) and by keys (`queries`); None where not
    used."""

    keys: Float[Array, "H N D"] | None
    queries: Float[Array, "H N D"] | None

    def at(self, rows: Int[np.ndarray, "N"]) -> "PositionTable":
        return PositionTable(*(None if table is None else table[:, rows] for table in self))


class CachedLayer(NamedTuple):
    """One layer's cached values for the texts already read."""

    kv: KeyValues
    table: PositionTable


def attend_by_distance(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H T D"],
    values: Float[Array, "B H T D"],
    table: PositionTable,
    mask: Bool[Array, "B T T"],
    scale: float,
    *,
    form: Form | None = None,
) -> Float[Array, "B H T D"]:
    """Disentangled attention in a whole text; `table` has a row for each distance 1 - T .. T - 1, and `mask[b, t, s]`
    says whether token t sees token s. A token that sees nothing gets some finite vector.

    `form` overrides the choice of `choose_form`. The kernel writes no scores to memory (`disentangled_kernel`); the
    plain form writes all of them, and is what the kernel is tested against.
    """
    if (form or choose_form(queries.dtype, *queries.shape[-2:])) == "kernel":
        from pargs_jax.models.disentangled_kernel import attend_disentangled

        return attend_disentangled(queries, keys, values, table, mask, scale)
    scores = jnp.einsum("bhqd,bhkd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = scores + position_scores_by_distance(queries, keys, table)
    return mix(scores, values, mask, scale)


def choose_form(dtype: jnp.dtype, length: int, head_dim: int) -> Form:
    """The form for texts of `length` tokens on the devices of the current mesh, or on the default device."""
    fits = dtype == jnp.bfloat16 and SHORTEST <= length <= LONGEST and head_dim <= WIDEST_HEAD
    return "kernel" if fits and current_device().platform == "tpu" else "plain"


def mix(
    scores: Float[Array, "B H T S"], values: Float[Array, "B H S D"], mask: Bool[Array, "B T S"], scale: float
) -> Float[Array, "B H T D"]:
    """Values mixed by the softmax of scores where the mask allows; the softmax is in fp32."""
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * scale, MINIMUM), axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(values.dtype), values)


def position_scores_by_distance(
    queries: Float[Array, "B H T D"], keys: Float[Array, "B H T D"], table: PositionTable
) -> Float[Array, "B H T T"] | float:
    """Scores of content with positions in a whole text; `table` has a row for each distance 1 - T .. T - 1."""
    scores: Any = 0.0
    if table.keys is not None:
        products = jnp.einsum("bhqd,hnd->bhqn", queries, table.keys[:, ::-1], preferred_element_type=jnp.float32)
        scores = scores + _skew(products)
    if table.queries is not None:
        products = jnp.einsum("bhkd,hnd->bhkn", keys, table.queries, preferred_element_type=jnp.float32)
        scores = scores + _skew(products).swapaxes(-1, -2)
    return scores


def cached_scores(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H S D"],
    offsets: Int[Array, "B T"],
    end: Int[Array, "B"],
    rows: Callable[[Int[Array, "*B"]], Int[Array, "*B"]],
    table: PositionTable,
) -> Float[Array, "B H T S"]:
    """All scores of new tokens with a cache's slots. Token t is `end + offsets[t] - s` positions away from slot s.

    Only a few distances occur between one block of slots and the new tokens, so each block is multiplied with those
    rows alone. `rows` maps distances to rows of the table.
    """
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys, preferred_element_type=jnp.float32)
    batch, heads, count, slots = scores.shape
    block = BLOCK if slots % BLOCK == 0 else slots
    last = jnp.arange(block - 1, slots, block)
    band = rows(end[:, None, None] - last[:, None] + jnp.arange(block + count - 1))
    if table.keys is not None:
        products = jnp.einsum("bhtd,hbnwd->bhtnw", queries, table.keys[:, band], preferred_element_type=jnp.float32)
        products = _shift_left(products, offsets[:, None, :, None, None], count - 1)
        scores = scores + products[..., :block][..., ::-1].reshape(scores.shape)
    if table.queries is not None:
        blocks = keys.reshape(batch, heads, -1, block, keys.shape[-1])
        products = jnp.einsum("bhncd,hbnwd->bhncw", blocks, table.queries[:, band], preferred_element_type=jnp.float32)
        by_offset = _skew(products).reshape(batch, heads, slots, count).swapaxes(-1, -2)
        scores = scores + jnp.take_along_axis(by_offset, offsets[:, None, :, None], axis=2)
    return scores


def pick_scores(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H S D"],
    rows: Int[Array, "B T S"],
    table: PositionTable,
) -> Float[Array, "B H T S"]:
    """All scores of queries with keys, for few of either; `rows[b, t, s]` is the row of the table for each pair."""
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
        products = jnp.einsum("bhtd,hnd->bhtn", queries, table.keys, preferred_element_type=jnp.float32)
        scores = scores + jnp.take_along_axis(products, rows[:, None], axis=-1)
    if table.queries is not None:
        products = jnp.einsum("bhsd,hnd->bhsn", keys, table.queries, preferred_element_type=jnp.float32)
        scores = scores + jnp.take_along_axis(products, rows.swapaxes(1, 2)[:, None], axis=-1).swapaxes(-1, -2)
    return scores


def _skew(x: Float[Array, "*B T N"]) -> Float[Array, "*B T S"]:
    """Entry (t, s) of the result is entry (t, s - t + T - 1) of x, for S = N - T + 1 columns (Dai et al., 2019)."""
    *batch, length, columns = x.shape
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*batch, length * (columns + 1))
    flat = flat[..., length - 1 : length - 1 + length * columns]
    return flat.reshape(*batch, length, columns)[..., : columns - length + 1]


def _shift_left(x: Float[Array, "*B N"], by: Int[Array, "*B 1"], most: int) -> Float[Array, "*B N"]:
    """Moves each row's entries `by` places to the left, at most `most`, in one pass per bit of `most`."""
    for bit in range(most.bit_length()):
        moved = jnp.pad(x[..., 1 << bit :], [(0, 0)] * (x.ndim - 1) + [(0, 1 << bit)])
        x = jnp.where(by >> bit & 1, moved, x)
    return x
