"""What lies where on a mesh: rules for parameters, and constraints for what is computed from them.

The dimensions of an array have names, which its model family gives (`name_dimensions`), and each name is split over one
axis of the mesh or none. One function gives the places of parameters for loading, initialising, restoring and compiling
ahead of time (`param_sharding`).
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from pargs_jax.errors import InputError

ROWS = ("data", "fsdp")
"""Rows of a batch are split over both of these axes."""

AXIS_OF = {"vocabulary": "tensor", "heads": "tensor", "feedforward": "tensor", "width": "fsdp"}

_INTO_LOW_RANK, _OUT_OF_LOW_RANK = ("width", None), (None, "heads")
LOW_RANK: dict[str, tuple[str | None, ...]] = {
    "lora_in": _INTO_LOW_RANK, "lora_out": _OUT_OF_LOW_RANK,
    "shared_in": _INTO_LOW_RANK, "shared_mix": (), "shared_out": _OUT_OF_LOW_RANK,
    "own_in": _INTO_LOW_RANK, "own_mix": (), "own_out": _OUT_OF_LOW_RANK, "preference": (),
}  # fmt: skip
"""The low-rank additions of linear layers (`pargs_jax.models.lora`, `preference_lora`), whatever the layer."""

_NAMES: dict[str, tuple[str | None, ...]] = {}
"""For each array, by its dotted path without the numbers of layers, the names of its last dimensions. Dimensions before
these (stacked layers), of size 1, or without a name are not split."""

VOCABULARY_MULTIPLE = 128
"""On a mesh, a vocabulary is padded to a multiple of this, whatever the mesh, so that a checkpoint fits every one.
Models cut logits to their vocabulary, and export cuts the rest: no padding is ever seen outside."""

Reader = Callable[[tuple[slice, ...]], np.ndarray]
"""Gives part of an array."""


def current_mesh() -> Mesh | None:
    """The mesh that is set (`jax.set_mesh`); None if none is."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def name_dimensions(path: str, names: tuple[str | None, ...]) -> None:
    """Says what the last dimensions of an array are called, which says how it is split.

    Model families do so for their arrays. Raises ValueError for a name that is not known, and for an array that another
    family has with other names: one path means one thing.
    """
    if unknown := set(names) - {*AXIS_OF, None}:
        raise ValueError(f"{path}: dimensions are called {', '.join(AXIS_OF)}, not {', '.join(map(str, unknown))}")
    if _NAMES.setdefault(path, names) != names:
        raise ValueError(f"{path}: its dimensions are {names} here and {_NAMES[path]} elsewhere; give it another path")


def dimension_names(path: str, rank: int) -> tuple[str | None, ...]:
    """What each dimension of the array at a dotted path is called."""
    plain = re.sub(r"\.\d+(?=\.)", "", path)
    names = LOW_RANK.get(plain.rpartition(".")[2], _NAMES.get(plain))
    if names is None:
        raise ValueError(f"{path}: no model family says how this array is split")
    return (None,) * (rank - len(names)) + names


def padded_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its vocabulary padded."""
    names = dimension_names(path, len(shape))
    return tuple(
        -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if name == "vocabulary" and size > 1 else size
        for size, name in zip(shape, names, strict=True)
    )


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lies. Raises InputError if a dimension does not divide by its axis."""
    axes = []
    for size, name in zip(shape, dimension_names(path, len(shape)), strict=True):
        axis = AXIS_OF.get(name) if size > 1 else None
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f"mesh: {axis}={mesh.shape[axis]} does not divide the {size} of {path} ({name}); "
                f"give another size of the axis {axis}"
            )
        axes.append(axis)
    return NamedSharding(mesh, PartitionSpec(*axes))


def place_param(path: str, shape: tuple[int, ...], dtype: np.dtype, read: Reader) -> Array:
    """A parameter on the mesh, every device's part read by itself; without a mesh, whole on the default device."""
    mesh = current_mesh()
    if mesh is None:
        return jnp.asarray(read(tuple(map(slice, shape))), dtype)
    full = padded_shape(path, shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [axis.indices(size) for axis, size in zip(index, full, strict=True)]
        inside = tuple(slice(min(a, n), min(b, n)) for (a, b, _), n in zip(bounds, shape, strict=True))
        if any(axis.start == axis.stop for axis in inside):  # a device's part may be padding alone
            return np.zeros([b - a for a, b, _ in bounds], dtype)
        block = np.asarray(read(inside)).astype(dtype, copy=False)
        missing = [(0, b - a - size) for (a, b, _), size in zip(bounds, block.shape, strict=True)]
        return np.pad(block, missing) if any(after for _, after in missing) else block

    return jax.make_array_from_callback(full, param_sharding(mesh, path, full), part)


def place_params(params: Any) -> Any:
    """Parameters that are here already, each placed where its names say."""
    return map_paths(lambda path, x: place_param(path, x.shape, x.dtype, lambda index: np.asarray(x[index])), params)


def abstract_params(mesh: Mesh, params: Any, dtype: Any = None) -> Any:
    """What `place_params` would give, as `jax.ShapeDtypeStruct`s with shardings on a mesh that may not be here."""

    def describe(path: str, x: Any) -> jax.ShapeDtypeStruct:
        shape = padded_shape(path, x.shape)
        return jax.ShapeDtypeStruct(shape, dtype or x.dtype, sharding=param_sharding(mesh, path, shape))

    return map_paths(describe, params)


def place_computed(function: Callable[..., Any], seed: int) -> Any:
    """Parameters that a function draws from a PRNG key, each device computing its own part; the values are the same on
    every mesh."""
    mesh = current_mesh()
    if mesh is None:
        return function(jax.random.key(seed))
    wanted = abstract_params(mesh, jax.eval_shape(function, jax.random.key(0)))

    def draw() -> Any:
        return jax.tree.map(
            lambda x, like: jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, like.shape, strict=True)]),
            function(jax.random.key(seed)),
            wanted,
        )

    return jax.jit(draw, out_shardings=shardings_of(wanted))()


def map_paths(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` of `function(path, leaf, ...)`, where a path is `backbone.embed.embedding`."""

    def with_path(path: Iterable[Any], *leaves: Any) -> Any:
        return function(".".join(str(key.key) for key in path), *leaves)

    return jax.tree_util.tree_map_with_path(with_path, tree, *others)


def shardings_of(tree: Any) -> Any:
    """Where every array of a tree lies."""
    return jax.tree.map(lambda x: x.sharding, tree)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Places of an optimizer's state: what belongs to a parameter lies as that does, all else is on every device."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings_of(params),
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def row_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts a batch's rows are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def row_spec(mesh: Mesh | AbstractMesh, count: int) -> PartitionSpec:
    """How so many rows are split: over `ROWS`, or not at all where that does not divide them."""
    return PartitionSpec() if count % row_shards(mesh) else PartitionSpec(ROWS)


def place_rows(mesh: Mesh | None, batch: Any) -> Any:
    """A batch on the mesh, each process sending its own devices their rows; without one, on the default device."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch)


def place_whole(mesh: Mesh | None, make: Callable[[], Any]) -> Any:
    """Whatever a function of nothing computes, whole on every device of the mesh, if there is one."""
    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def constrain(x: Float[Array, "..."], *axes: str | tuple[str, ...] | None) -> Array:
    """Says how an array that is being computed is split, the last dimensions by these axes; nothing without a mesh.

    Axes that do not divide their dimension are left out.
    """
    spec = spec_of(x.shape, *axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def spec_of(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> PartitionSpec | None:
    """How an array of this shape is split, the last dimensions by these axes; None without a mesh.

    Axes that do not divide their dimension are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    axes = (None,) * (len(shape) - len(axes)) + axes
    divides = [
        axis is not None and size % int(np.prod([mesh.shape[name] for name in np.atleast_1d(axis)])) == 0
        for axis, size in zip(axes, shape, strict=True)
    ]
    return PartitionSpec(*(axis if divides_it else None for axis, divides_it in zip(axes, divides, strict=True)))


def on_every_device(tree: Any) -> Any:
    """Says that arrays being computed are whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def to_host(x: Array) -> np.ndarray:
    """A whole array as numpy's, in every process; all must call."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
