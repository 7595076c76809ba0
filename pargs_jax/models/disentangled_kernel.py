"""Disentangled attention as a kernel for TPUs, which writes neither scores nor their gradients to memory.

A tile is the scores of one block of queries with one block of keys. Only two blocks of distances occur in it: it needs
two neighbouring blocks of the position table. Its scores with positions are products with these, of which each row is
then moved into place: row r by r columns. The softmax is computed tile by tile; the backward pass computes each tile's
scores again.

Tiles hold keys in rows and queries in columns. Then what belongs to a query (its largest score, its sum) is a row.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int8

from pargs_jax.models.disentangled import LONGEST, MINIMUM, WIDEST_HEAD, PositionTable
from pargs_jax.sharding import ROWS, spec_of

BLOCKS = (256, 128)
"""Sizes of tiles. Texts are padded to a multiple of the last; the first that divides their length is used."""

SUBLANES = 8
"""Rows of a TPU's register; blocks are multiples of it."""

LOWEST = MINIMUM / 2
"""The largest score of a query that has seen nothing yet: above invisible scores, so that their weights are 0."""


def attend_disentangled(
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H T D"],
    values: Float[Array, "B H T D"],
    table: PositionTable,
    mask: Bool[Array, "*B T T"],
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "B H T D"]:
    """Attention of T tokens to each other with scores by content and by distance; `table` has a row for each distance
    1 - T .. T - 1, and `mask[..., t, s]` says whether token t sees token s. A token that sees nothing gets zeros.

    The softmax and sums are in fp32. `interpret` runs the kernel on any device, slowly, and in any dtype. Raises
    ValueError for texts or heads that do not fit a TPU core's memory, and without `interpret` for other dtypes than
    bfloat16, because a TPU rounds the factors of products to it.
    """
    batch, _, length, width = queries.shape
    if length > LONGEST or width > WIDEST_HEAD:
        raise ValueError(
            f"texts of {length} tokens with heads of width {width}: the kernel takes at most {LONGEST} tokens and a "
            f"width of {WIDEST_HEAD}; use the plain form"
        )
    if not interpret and queries.dtype != jnp.bfloat16:
        raise ValueError(f"the kernel computes in bfloat16, not {queries.dtype}; use the plain form")
    lacking = -length % BLOCKS[-1]
    padded = length + lacking
    block = next(size for size in BLOCKS if padded % size == 0)
    queries, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, lacking), (0, 0))) for x in (queries, keys, values))
    mask = jnp.broadcast_to(mask, (batch, length, length))
    seen = jnp.pad(mask.swapaxes(1, 2), ((0, 0), (0, lacking), (0, lacking))).astype(jnp.int8)
    # Row r of `keys` is now distance `padded - r`, and row r of `queries` distance `r - padded`.
    tables = PositionTable(
        *(
            None if rows is None else jnp.pad(rows.astype(keys.dtype), ((0, 0), (lacking + 1, lacking), (0, 0)))
            for rows in (None if table.keys is None else table.keys[:, ::-1], table.queries)
        )
    )
    run = partial(_attend, scale, block, interpret)
    spec = spec_of(queries.shape, ROWS, "tensor", None, None)
    if spec is not None:  # the compiler cannot split a kernel by itself
        of_heads, of_rows = PartitionSpec(spec[1], None, None), PartitionSpec(spec[0], None, None)
        run = jax.shard_map(run, in_specs=(spec, spec, spec, of_heads, of_rows), out_specs=spec, check_vma=False)
    return run(queries, keys, values, tables, seen)[:, :, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    scale: float,
    block: int,
    interpret: bool,
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B H T D"],
    values: Float[Array, "B H T D"],
    table: PositionTable,
    seen: Int8[Array, "B T T"],
) -> Float[Array, "B H T D"]:
    """`seen[b, s, t]` says whether token t sees token s; tables have 2T rows."""
    return _attend_forward(scale, block, interpret, queries, keys, values, table, seen)[0]


def _attend_forward(
    scale: float, block: int, interpret: bool, queries: Array, keys: Array, values: Array, table: Any, seen: Array
) -> tuple[Array, tuple[Any, ...]]:
    batch, heads, length, width = queries.shape
    count = length // block

    def of_tile(h: Any, b: Any, i: Any, j: Any) -> tuple[Any, ...]:
        return h, b, i, j

    specs = _Specs(block, width, count, of_tile)
    mixed, sums = pl.pallas_call(
        partial(_forward_kernel, scale),
        grid=(heads, batch, count, count),
        in_specs=(specs.queries, specs.keys, specs.keys, specs.runs(table), specs.seen),
        out_specs=(specs.queries, specs.of_queries),
        out_shape=(
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ),
        scratch_shapes=[pltpu.VMEM((rows, block), jnp.float32) for rows in (1, 1, width)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="disentangled_attention",
    )(queries, keys, values, _twice(table), seen)
    return mixed, (queries, keys, values, table, seen, mixed, sums)


def _attend_backward(
    scale: float, block: int, interpret: bool, kept: tuple[Any, ...], gradient: Array
) -> tuple[Array, Array, Array, PositionTable, None]:
    queries, keys, values, table, seen, mixed, sums = kept
    batch, heads, length, width = queries.shape
    count = length // block
    product = (gradient.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1)[:, :, None]

    def of_tile(h: Any, b: Any, j: Any, i: Any) -> tuple[Any, ...]:
        return h, b, i, j

    specs = _Specs(block, width, count, of_tile)
    whole_text = pl.BlockSpec((1, 1, length, width), lambda h, b, j, i: (b, h, 0, 0))
    whole_table = pl.BlockSpec((1, 2 * length, width), lambda h, b, j, i: (h, 0, 0))
    *gradients, of_table = pl.pallas_call(
        partial(_backward_kernel, scale),
        grid=(heads, batch, count, count),  # a head's texts follow one another, so that its table's gradient stays
        in_specs=(
            specs.queries, specs.keys, specs.keys, specs.runs(table), specs.seen, specs.queries, specs.of_queries,
            specs.of_queries,
        ),
        out_specs=(whole_text, specs.keys, specs.keys, jax.tree.map(lambda _: whole_table, table)),
        out_shape=(
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, keys, values)),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), table),
        ),
        scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for rows in (length, block, block)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="disentangled_attention_backward",
    )(queries, keys, values, _twice(table), seen, gradient, sums, product)  # fmt: skip
    return *gradients, jax.tree.map(lambda x, like: x.astype(like.dtype), of_table, table), None


_attend.defvjp(_attend_forward, _attend_backward)


class _Specs:
    """The parts of arrays that a tile needs. `of_tile` gives head, text, block of queries and block of keys from the
    grid's indices."""

    def __init__(self, block: int, width: int, count: int, of_tile: Any) -> None:
        def spec(shape: tuple[int, ...], index: Any) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *at: index(*of_tile(*at)))

        self.queries = spec((1, 1, block, width), lambda h, b, i, j: (b, h, i, 0))
        self.keys = spec((1, 1, block, width), lambda h, b, i, j: (b, h, j, 0))
        self.of_queries = spec((1, 1, 1, block), lambda h, b, i, j: (b, h, 0, i))
        self.seen = spec((1, block, block), lambda h, b, i, j: (b, j, i))
        self._of_keys, self._of_queries = (
            tuple(spec((1, block, width), partial(_run_block, count, sign, half)) for half in (0, 1))
            for sign in (-1, 1)
        )

    def runs(self, table: PositionTable) -> PositionTable:
        """Two neighbouring blocks of each table that is used."""
        return PositionTable(
            None if table.keys is None else self._of_keys, None if table.queries is None else self._of_queries
        )


def _run_block(count: int, sign: int, half: int, h: Any, b: Any, i: Any, j: Any) -> tuple[Any, Any, int]:
    return h, count - 1 + sign * (i - j) + half, 0


def _twice(table: PositionTable) -> PositionTable:
    """Operands for `_Specs.runs`."""
    return PositionTable(*(None if rows is None else (rows, rows) for rows in table))


def _forward_kernel(
    scale: float, queries: Any, keys: Any, values: Any, runs: Any, seen: Any, mixed: Any, sums: Any, most: Any,
    total: Any, mixing: Any,
) -> None:  # fmt: skip
    """One tile. `most`, `total` [1 Q] and `mixing` [D Q] are of the keys so far."""
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _start() -> None:
        most[...] = jnp.full_like(most, LOWEST)
        total[...] = jnp.zeros_like(total)
        mixing[...] = jnp.zeros_like(mixing)

    scores = _scores(queries[0, 0], keys[0, 0], _load(runs), seen, scale)
    higher = jnp.maximum(most[...], scores.max(axis=0, keepdims=True))
    weights = jnp.exp(scores - higher)
    shrunk = jnp.exp(most[...] - higher)
    most[...] = higher
    total[...] = total[...] * shrunk + weights.sum(axis=0, keepdims=True)
    mixing[...] = mixing[...] * shrunk + _dot(values[0, 0], weights.astype(values.dtype), 0, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _end() -> None:
        sum_of = jnp.where(total[...] == 0, 1.0, total[...])
        mixed[0, 0] = (mixing[...] / sum_of).T.astype(mixed.dtype)
        sums[0, 0] = most[...] + jnp.log(sum_of)


def _backward_kernel(
    scale: float, queries: Any, keys: Any, values: Any, runs: Any, seen: Any, gradient: Any, sums: Any, product: Any,
    to_queries: Any, to_keys: Any, to_values: Any, to_table: Any, queries_sum: Any, keys_sum: Any, values_sum: Any,
) -> None:  # fmt: skip
    """One tile. `queries_sum` [T D] is of all tiles of a text; `keys_sum` and `values_sum` of all queries so far;
    `to_table` of all texts so far."""
    text, j, i = pl.program_id(1), pl.program_id(2), pl.program_id(3)
    count = pl.num_programs(3)
    block = keys.shape[2]

    @pl.when((text == 0) & (j == 0) & (i == 0))
    def _start_head() -> None:
        for ref in jax.tree.leaves(to_table):
            ref[...] = jnp.zeros_like(ref)

    @pl.when((j == 0) & (i == 0))
    def _start_text() -> None:
        queries_sum[...] = jnp.zeros_like(queries_sum)

    @pl.when(i == 0)
    def _start_keys() -> None:
        keys_sum[...] = jnp.zeros_like(keys_sum)
        values_sum[...] = jnp.zeros_like(values_sum)

    def rows_of(start: Any, size: int) -> Any:
        return pl.ds(pl.multiple_of(start * block, block), size)

    q, k, out = queries[0, 0], keys[0, 0], gradient[0, 0]
    run = _load(runs)
    weights = jnp.exp(_scores(q, k, run, seen, scale) - sums[0, 0])
    to_weights = _dot(values[0, 0], out, 1, 1)
    to_scores = weights * (to_weights - product[0, 0]) * scale
    by_query = to_scores.T
    values_sum[...] += _dot(weights.astype(q.dtype), out, 1, 0)
    to_q = _dot(by_query.astype(q.dtype), k, 1, 0)
    to_k = _dot(to_scores.astype(q.dtype), q, 1, 0)
    if run.keys is not None:
        by_row = _unskew(by_query).astype(q.dtype)
        to_q += _dot(by_row, run.keys, 1, 0)
        to_table.keys[0, rows_of(count - 1 - i + j, 2 * block)] += _dot(by_row, q, 0, 0)
    if run.queries is not None:
        by_row = _unskew(to_scores).astype(q.dtype)
        to_k += _dot(by_row, run.queries, 1, 0)
        to_table.queries[0, rows_of(count - 1 + i - j, 2 * block)] += _dot(by_row, k, 0, 0)
    own = rows_of(i, block)
    queries_sum[own] += to_q
    keys_sum[...] += to_k

    @pl.when(j == count - 1)
    def _end_queries() -> None:
        to_queries[0, 0, own] = queries_sum[own].astype(to_queries.dtype)

    @pl.when(i == count - 1)
    def _end_keys() -> None:
        to_keys[0, 0] = keys_sum[...].astype(to_keys.dtype)
        to_values[0, 0] = values_sum[...].astype(to_values.dtype)


def _load(runs: Any) -> PositionTable:
    """Each table's run of 2 blocks, [2Q D]."""
    return PositionTable(*(None if run is None else jnp.concatenate([half[0] for half in run]) for run in runs))


def _scores(
    queries: Float[Array, "Q D"], keys: Float[Array, "K D"], run: PositionTable, seen: Any, scale: float
) -> Float[Array, "K Q"]:
    scores = _dot(keys, queries, 1, 1)
    if run.keys is not None:
        scores += _skew(_dot(queries, run.keys, 1, 1)).T
    if run.queries is not None:
        scores += _skew(_dot(keys, run.queries, 1, 1))
    return jnp.where(seen[0].astype(jnp.int32) != 0, scores * scale, MINIMUM)


def _dot(left: Float[Array, "I J"], right: Float[Array, "K L"], left_axis: int, right_axis: int) -> Array:
    """A product in fp32, summed over one axis of each."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _skew(x: Float[Array, "Q C"]) -> Float[Array, "Q Q"]:
    """Entry (r, c) of the result is entry (r, Q - r + c) of x, which has C = 2Q columns.

    Rows of a register move by up to 7 columns, in a pass for each bit; registers as a whole move by the rest. (A roll
    with a stride would do both, but a TPU v4 has none.)
    """
    block = len(x)
    x = _move_rows(x, 1)
    groups = [_roll(x[g : g + SUBLANES], block + g)[:, :block] for g in range(0, block, SUBLANES)]
    return jnp.concatenate(groups)


def _unskew(x: Float[Array, "Q Q"]) -> Float[Array, "Q C"]:
    """The transpose of `_skew`: its entries where they come from, and zeros elsewhere."""
    block = len(x)
    x = jnp.concatenate([x, jnp.zeros_like(x)], axis=1)
    groups = [_roll(x[g : g + SUBLANES], block - g) for g in range(0, block, SUBLANES)]
    return _move_rows(jnp.concatenate(groups), -1)


def _move_rows(x: Float[Array, "Q C"], direction: int) -> Float[Array, "Q C"]:
    """Rolls row r to the right by `direction * (r % SUBLANES)`."""
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range(SUBLANES.bit_length() - 1):
        x = jnp.where(rows >> bit & 1 == 1, _roll(x, direction << bit), x)
    return x


def _roll(x: Float[Array, "R C"], by: int) -> Float[Array, "R C"]:
    by %= x.shape[1]
    return x if by == 0 else pltpu.roll(x, by, 1)
