"""The cache of a shared prefix, and how it grows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pargs_jax.sharding import ROWS, constrain


class Cache(NamedTuple):
    """Keys and values of a left-padded batch; slots `start[b] <= s < length` are real. `length` is one number, or one
    for each row.

    `kv` is `KeyValues[L B H S D]` for stacked layers, a tuple of L `KeyValues[B H S D]` for unrolled ones. `tables` are
    what a model computed once from its weights, in the same form (see `PrefixCausalModel`).
    """

    kv: Any
    start: Int[Array, "B"]
    length: Int[Array, "*B"]
    tables: Any = None

    @property
    def slots(self) -> int:
        """Room for tokens."""
        return jax.tree.leaves(self.kv)[0].shape[-2]

    @property
    def valid(self) -> Bool[Array, "B S"]:
        """Which slots are real."""
        slots = jnp.arange(self.slots)
        return (slots >= self.start[:, None]) & (slots < self.length[..., None])

    @property
    def next_position(self) -> Int[Array, "B"]:
        """Where the next token of each row stands in its text."""
        return self.length - self.start


def with_room(new: Any, width: int, capacity: int) -> Any:
    """Keys and values of prompts, `[... B H P D]`, padded to `capacity` slots."""
    room = [(0, 0), (0, 0), (0, capacity - width), (0, 0)]
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 4) + room), new)
    return jax.tree.map(lambda x: constrain(x, ROWS, "tensor", None, None), padded)


def append_choice(cache: Cache, pending: Any, choice: Int[Array, "B"]) -> Cache:
    """Appends one of K pending tokens to every row, `choice[b]` in `0..K-1`. All rows have one length."""

    def append(stored: Array, new: Array) -> Array:
        if new.shape[-2] > 1:
            index = choice.reshape((1,) * (new.ndim - 4) + (-1, 1, 1, 1))
            new = jnp.take_along_axis(new, index, axis=-2)
        position = [jnp.zeros((), jnp.int32)] * (stored.ndim - 2) + [cache.length, jnp.zeros((), jnp.int32)]
        return jax.lax.dynamic_update_slice(stored, new, position)

    return cache._replace(kv=jax.tree.map(append, cache.kv, pending), length=cache.length + 1)


def append_several(cache: Cache, pending: Any, counts: Int[Array, "B"]) -> Cache:
    """Appends the first `counts[b]` of each row's T pending tokens; rows may grow by different numbers.

    Needs room for all T after a row's end: what is written past the count is overwritten by what comes next.
    """
    lengths = jnp.broadcast_to(cache.length, counts.shape)
    write = jax.vmap(lambda stored, new, at: jax.lax.dynamic_update_slice(stored, new, (0, at, 0)))
    write_stacked = jax.vmap(write, (0, 0, None))

    def append(stored: Array, new: Array) -> Array:
        return (write_stacked if stored.ndim == 5 else write)(stored, new, lengths)

    return cache._replace(kv=jax.tree.map(append, cache.kv, pending), length=lengths + counts)
