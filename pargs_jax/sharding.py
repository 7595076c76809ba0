"""How arrays are placed on a mesh: rules for parameters, and constraints for arrays computed from them.

The dimensions of an array have names, which its model family gives (`name_dimensions`). Each name is split over one
axis of the mesh, or not at all. `param_sharding` alone places parameters, for loading, initialising, restoring and
compiling ahead of time.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

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
"""The low-rank additions of linear layers (`pargs_jax.models.lora`, `preference_lora`), the same for every layer of the
blocks."""

_NAMES: dict[str, tuple[str | None, ...]] = {}
"""The names of each array's last dimensions, by its dotted path without layer numbers. Dimensions before these (stacked
layers), of size 1, or without a name are not split."""

VOCABULARY_MULTIPLE = 128
"""On any mesh, vocabularies are padded to a multiple of this, so that a checkpoint fits every mesh. Models cut logits
to their vocabulary and export removes the rest, so padding is never visible outside."""

Reader = Callable[[tuple[slice, ...]], np.ndarray]
"""Returns part of an array."""


def current_mesh() -> Mesh | None:
    """The current mesh (`jax.set_mesh`), or None."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def current_device() -> Any:
    """A device of the current mesh, real or described, or else the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device


def name_dimensions(path: str, names: tuple[str | None, ...]) -> None:
    """Names the last dimensions of an array, which determines how it is split.

    Model families call this for their arrays. Raises ValueError for an unknown name, and for an array that another
    family names differently: a path means the same in all families.
    """
    if unknown := set(names) - {*AXIS_OF, None}:
        raise ValueError(f"{path}: dimensions are called {', '.join(AXIS_OF)}, not {', '.join(map(str, unknown))}")
    if _NAMES.setdefault(path, names) != names:
        raise ValueError(f"{path}: its dimensions are {names} here and {_NAMES[path]} elsewhere; give it another path")


def dimension_names(path: str, rank: int) -> tuple[str | None, ...]:
    """The name of each dimension of the array at a dotted path."""
    plain = re.sub(r"\.\d+(?=\.)", "", path)
    names = _NAMES.get(plain, LOW_RANK.get(plain.rpartition(".")[2]))
    if names is None:
        raise ValueError(f"{path}: no model family says how this array is split")
    return (None,) * (rank - len(names)) + names


def padded_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its vocabulary dimension padded."""
    names = dimension_names(path, len(shape))
    return tuple(
        -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if name == "vocabulary" and size > 1 else size
        for size, name in zip(shape, names, strict=True)
    )


def param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a parameter. Raises InputError if a dimension is not divisible by the size of its axis."""
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
    """A parameter on the mesh; each device's part is read separately. Without a mesh, whole on the default device."""
    mesh = current_mesh()
    if mesh is None:
        return jnp.asarray(read(tuple(map(slice, shape))), dtype)
    full = padded_shape(path, shape)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [axis.indices(size) for axis, size in zip(index, full, strict=True)]
        inside = tuple(slice(min(a, n), min(b, n)) for (a, b, _), n in zip(bounds, shape, strict=True))
        if any(axis.start == axis.stop for axis in inside):  # a device's part may be all padding
            return np.zeros([b - a for a, b, _ in bounds], dtype)
        block = np.asarray(read(inside)).astype(dtype, copy=False)
        missing = [(0, b - a - size) for (a, b, _), size in zip(bounds, block.shape, strict=True)]
        return np.pad(block, missing) if any(after for _, after in missing) else block

    return jax.make_array_from_callback(full, param_sharding(mesh, path, full), part)


def place_params(params: Any) -> Any:
    """Places existing parameters on the mesh according to their names."""
    return map_paths(lambda path, x: place_param(path, x.shape, x.dtype, lambda index: np.asarray(x[index])), params)


def abstract_params(mesh: Mesh, params: Any, dtype: Any = None) -> Any:
    """The result of `place_params` as `jax.ShapeDtypeStruct`s, with shardings on a mesh that may not be here. `dtype`
    is that of floating-point arrays."""

    def describe(path: str, x: Any) -> jax.ShapeDtypeStruct:
        shape = padded_shape(path, x.shape)
        own = dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        return jax.ShapeDtypeStruct(shape, own, sharding=param_sharding(mesh, path, shape))

    return map_paths(describe, params)


def place_computed(function: Callable[..., Any], seed: int) -> Any:
    """Parameters that a function draws from a PRNG key; each device computes its own part. The values are the same on
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
    """`jax.tree.map` of `function(path, leaf, ...)`; paths look like `backbone.embed.embedding`."""

    def with_path(path: Iterable[Any], *leaves: Any) -> Any:
        return function(".".join(str(key.key) for key in path), *leaves)

    return jax.tree_util.tree_map_with_path(with_path, tree, *others)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: arrays of a parameter follow the parameter; all else is on every device."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings_of(params),
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )


def row_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """The number of parts that a batch's rows are split into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def parts_of_rows(count: int) -> int:
    """The number of parts that `count` rows, which are being computed, are split into."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else row_shards(mesh)
    return 1 if count % shards else shards


def row_spec(mesh: Mesh | AbstractMesh, count: int) -> PartitionSpec:
    """How `count` rows are split: over `ROWS`, or not at all if `count` is not divisible."""
    return PartitionSpec() if count % row_shards(mesh) else PartitionSpec(ROWS)


def place_rows(mesh: Mesh | None, batch: Any) -> Any:
    """A batch on the mesh; each process sends rows to its own devices. Without a mesh, on the default device."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch)


def own_rows(mesh: Mesh | None, count: int) -> Bool[np.ndarray, "B"]:
    """Which of the rows of a batch `place_rows` sends to this process's devices."""
    own = np.zeros(count, bool)
    if mesh is None:
        return ~own
    places = NamedSharding(mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((count,))
    for (rows,) in places.values():
        own[rows] = True
    return own


def place_whole(mesh: Mesh | None, make: Callable[[], Any]) -> Any:
    """The result of `make`, whole on every device of the mesh, if there is one."""
    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def constrain(x: Float[Array, "..."], *axes: str | tuple[str, ...] | None) -> Array:
    """Says how an array that is being computed is split: the last dimensions over these axes. Does nothing without a
    mesh.

    Axes whose size does not divide their dimension are left out.
    """
    spec = spec_of(x.shape, *axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def spec_of(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> PartitionSpec | None:
    """How an array of this shape is split: the last dimensions over these axes; None without a mesh.

    Axes whose size does not divide their dimension are left out.
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
    """Requires arrays that are being computed to be whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def to_host(x: Array) -> np.ndarray:
    """A whole array as numpy's, in every process; all processes must call this."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
