"""Reads and writes the tensors of a Hugging Face checkpoint by its family's table. Each device reads only the parts of
the safetensors files that it holds."""

import collections
import dataclasses
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pargs_jax.errors import InputError, first_line, warn
from pargs_jax.json_text import parse_json
from pargs_jax.models.family import VALUE_HEADS, Family
from pargs_jax.models.int8 import MATRIX, quantise, quantise_layers
from pargs_jax.models.model import Model, Params
from pargs_jax.models.tables import Row
from pargs_jax.sharding import map_paths, on_every_device, place_param, to_host

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VALUE_HEAD = "value_head.safetensors"
"""Some trainers save a value head in a file of its own, beside the model's."""
ADAPTER = "adapter_model.safetensors"
"""Of a PEFT adapter (`pargs_jax.models.adapters`)."""
FLOATS = ("F16", "BF16", "F32", "F64")
"""Dtypes of tensors that are usable as weights directly. Integers and 8-bit floats need scales, or are masks."""


class Stored(NamedTuple):
    """The file that holds a tensor, and the tensor's name, shape and dtype there."""

    path: Path
    name: str
    shape: tuple[int, ...]
    format: str


class Addition(NamedTuple):
    """What an adapter adds to a linear layer: `scale * B A`, as torch stores it. For a table of embeddings, which torch
    stores in our order of dimensions, it is the transpose of that."""

    a: Stored
    b: Stored
    scale: float

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """A part of the addition in our order of dimensions, `[in out]`, in fp32."""
        with _opened(self.a) as a, _opened(self.b) as b:
            return self.scale * (a[:, rows].astype(np.float32).T @ b[columns].astype(np.float32).T)


class Tensors(dict[str, Stored]):
    """The tensors of a checkpoint, by their names without the backbone's prefix; they are read only on demand.
    `additions` are those of an adapter, by the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.additions: dict[str, Addition] = {}

    def shape(self, row: Row, layer: int) -> tuple[int, ...]:
        """The shape of the tensor that a row names, in our order of dimensions. A joined tensor counts as a whole."""
        shape = self[row.tensor.format(layer)].shape
        return shape[::-1] if row.transpose else shape

    def read(self, row: Row, layer: int, columns: range, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part `index` of the array that a row makes of a tensor, and nothing else.

        `columns` says where the array's last dimension lies in the tensor's.
        """
        chosen = columns[index[-1]]
        index = (*index[:-1], slice(chosen.start, chosen.stop))
        name = row.tensor.format(layer)
        with _opened(self[name]) as tensor:
            part = tensor[index[::-1]].T if row.transpose else tensor[index]
        if (addition := self.additions.get(name)) is not None:
            part = part.astype(np.float32) + addition.read(*index)
        return part

    def are_equal(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two matrices have the same values. Reads `rows` rows at a time and stops at the first difference."""
        if self[one] == self[other]:
            return True
        if self[one].shape != self[other].shape:
            return False
        with _opened(self[one]) as first, _opened(self[other]) as second:
            count = self[one].shape[0]
            blocks = (slice(start, min(start + rows, count)) for start in range(0, count, rows))
            return all(np.array_equal(first[block], second[block]) for block in blocks)


@contextmanager
def _opened(stored: Stored) -> Iterator[Any]:
    """A tensor in its file, whose parts can be read."""
    from safetensors import safe_open

    with safe_open(stored.path, framework="numpy") as file:
        yield file.get_slice(stored.name)


def stored_in(path: Path) -> Iterator[Stored]:
    """The tensors of a safetensors file. Raises InputError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield Stored(path, name, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def open_tensors(folder: Path, family: Family) -> Tensors:
    """Finds a checkpoint's tensors, in `model.safetensors` or in the files that the index names.

    Raises InputError if neither can be read, if two tensors have the same name, or if a tensor is not floating-point.
    """
    tensors = Tensors()
    value_head = [path] if (path := folder / VALUE_HEAD).is_file() else []
    for path in [*_files(folder), *value_head]:
        for stored in stored_in(path):
            name = family.name_in_rows(stored.name)
            if name in tensors and tensors[name].name != stored.name:
                raise InputError(f"{path}: {tensors[name].name} and {stored.name} are both {name} of the model")
            tensors[name] = stored
    for name, stored in tensors.items():
        if stored.format not in FLOATS and not re.fullmatch(family.ignored, name):
            raise InputError(
                f"{stored.path}: {stored.name} is stored as {stored.format}, weights must be {', '.join(FLOATS)}; "
                "quantised checkpoints cannot be read"
            )
    return tensors


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}; weights are read from safetensors only")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map, which says where each tensor is")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {name} is in {file!r}, must be the name of a safetensors file")
    return sorted({folder / file for file in weight_map.values()})


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises InputError for a file that does not contain one."""
    try:
        content = parse_json(path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: not a JSON object (it {error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def share_tied_table(model: Model, family: Family, tensors: Tensors) -> None:
    """Gives the table of a checkpoint whose config ties the head to the embeddings both names, if it is stored once."""
    head, embed = _tied_tensors(model, family)
    for one, other in ((head, embed), (embed, head)):
        if one in tensors:
            tensors.setdefault(other, tensors[one])


def settle_tied_head(model: Model, family: Family, tensors: Tensors, folder: Path) -> Model:
    """Decides, as transformers does, whether a language model whose config ties the head to the embeddings is tied
    (`share_tied_table` comes first). A stored head that differs from the embeddings is used, with a warning. So is one
    of an adapter: PEFT changes the head or the embeddings alone, or each by an addition of its own."""
    head, embed = _tied_tensors(model, family)
    if head not in tensors:
        return model
    is_adapted = not tensors.additions.keys().isdisjoint((head, embed))
    if not is_adapted and tensors.are_equal(head, embed):
        return model
    why = (
        "the adapter changes one without the other, or each by itself, so they are two matrices from here on"
        if is_adapted
        else "the checkpoint stores a different one, which is used"
    )
    warn(f"{folder}: config.json ties {head} to {embed}, but {why}")
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tied_embeddings=False))


def _tied_tensors(model: Model, family: Family) -> tuple[str, str]:
    """The names of the head's tensor and that of the embeddings."""
    (head,) = (row.tensor for row in model.head_kind.rows)
    return head, token_table(family)


def token_table(family: Family) -> str:
    """The name of the tensor with the token embeddings."""
    return next(row.tensor for row in family.rows if row.path == "embed.embedding")


def import_params(
    model: Model,
    family: Family,
    tensors: Tensors,
    folder: Path,
    dtype: np.dtype,
    new_head: bool,
    seed: int,
    label_shares: Float[np.ndarray, "labels"] | None = None,
    *,
    int8: bool = False,
) -> Params:
    """Fills the model's parameters from the checkpoint; each device reads only its parts. `label_shares` says how the
    rewards of a stored classifier's labels add up to the model's one reward. With `int8`, each matrix of the layers is
    rounded as soon as it is read, so that no more than one is there in `dtype`.

    Raises InputError for tensors that do not match the model: all of them in one error, before any is read. Once they
    are loaded, it also raises InputError for tensors with numbers that are not finite.
    """
    problems: list[str] = []
    used: set[str] = set()
    columns, widths = columns_of(family, model)

    def check(row: Row, layer: int, shape: tuple[int, ...]) -> None:
        name = row.tensor.format(layer)
        if name not in used and not re.fullmatch(family.identities, name):
            used.add(name)
            whole = (*shape[:-1], widths[row.tensor])
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif (stored := tensors.shape(row, layer)) != whole:
                problems.append(f"{name} has shape {stored}, the config needs {whole}")

    def read_layer(row: Row, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        if re.fullmatch(family.identities, row.tensor.format(layer)):
            return np.full(len(columns[row.path][index[-1]]), float(row.path.endswith("scale")), dtype)
        return tensors.read(row, layer, columns[row.path], index)

    def read(row: Row, index: tuple[slice, ...]) -> np.ndarray:
        if "{}" not in row.tensor:
            return tensors.read(row, 0, columns[row.path], index)
        layers = range(model.config.layers)[index[0]]
        return np.stack([read_layer(row, layer, index[1:]) for layer in layers])

    def mix_labels(row: Row, index: tuple[slice, ...]) -> np.ndarray:
        stored = read(row, (*index[:-1], slice(None)))
        return (stored.astype(np.float32) @ label_shares)[..., None]

    readers: Params = {}
    for path, leaf in _flatten(model.abstract_params()):
        row = _row(family, model, path)
        if path[0] == "head" and new_head and row.tensor not in tensors:
            _set(readers, path, _drawn(row, leaf.shape, model.head_kind.std(model.config), seed).__getitem__)
            continue
        is_mixed = label_shares is not None and path[0] == "head" and leaf.shape[-1] == 1
        if is_mixed:
            columns[row.path], widths[row.tensor] = range(len(label_shares)), len(label_shares)
        if "{}" in row.tensor:
            for layer in range(leaf.shape[0]):
                check(row, layer, leaf.shape[1:])
        else:
            check(row, 0, leaf.shape)
        _set(readers, path, partial(mix_labels if is_mixed else read, row))
    # A language model may be read as a reward model and vice versa, so an unused head is not an error.
    used |= {row.tensor for head in model.heads.values() for row in head.rows}
    unexpected = [n for n in tensors if n not in used and not re.fullmatch(family.ignored, n)]
    problems += [f"{name} {_unexpected(name)}" for name in unexpected]
    if problems:
        raise InputError(f"{folder}: the weights do not match config.json: {_list(problems)}")

    def place(path: str, leaf: Any, reader: Any) -> Any:
        array = place_param(path, leaf.shape, dtype, reader)
        is_rounded = int8 and path.startswith("backbone.layers.") and path.endswith(f".{MATRIX}")
        return quantise(array) if is_rounded else array

    params = map_paths(place, model.abstract_params(), readers)
    if int8:
        params = quantise_layers(params, lambda matrix_and_scale: matrix_and_scale)
    _check_finite(params, model, family, folder, dtype)
    return params


def _check_finite(params: Params, model: Model, family: Family, folder: Path, dtype: np.dtype) -> None:
    """Raises InputError, in all processes alike, that names the tensors with NaN or infinity."""
    rows = {path: _row(family, model, (*path[:-1], path[-1].removesuffix("_scale"))) for path, _ in _flatten(params)}
    bad: dict[str, None] = {}
    for path, is_finite in _flatten(_are_finite(params)):
        tensor = rows[path].tensor
        found = np.atleast_1d(to_host(is_finite))
        layers = np.flatnonzero(~(found if "{}" in tensor else found.all(keepdims=True)))
        bad |= dict.fromkeys(tensor.format(layer) for layer in layers)
    if bad:
        raise InputError(f"{folder}: NaN or infinite numbers, read as {dtype}, in {_list(list(bad))}")


@jax.jit
def _are_finite(params: Params) -> Params:
    """For each array, whether the entries along its first dimension (the layers of a stack) are finite."""

    def is_finite(x: jax.Array) -> jax.Array:
        # A sum of floats, because `all` takes three times as long to compile on CPUs.
        return jnp.where(jnp.isfinite(x), 0.0, 1.0).sum(axis=tuple(range(1, x.ndim))) == 0

    return on_every_device(jax.tree.map(is_finite, params))


def export_tensors(model: Model, family: Family, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a checkpoint one by one, for a model with stacked layers. Every process must consume them
    all."""
    shapes = {path: leaf.shape for path, leaf in _flatten(model.abstract_params())}
    columns, widths = columns_of(family, model)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in _flatten(params):
        row = _row(family, model, path)
        is_head = path[0] == "head"
        name = family.head_names.get(row.tensor, row.tensor) if is_head else family.backbone_prefix + row.tensor
        value = to_host(leaf)[tuple(map(slice, shapes[path]))]  # without the padding of a sharded vocabulary
        if value.shape[-1] < widths[row.tensor]:
            found = parts.setdefault(row.tensor, {})
            found[columns[row.path].start] = value
            if sum(part.shape[-1] for part in found.values()) < widths[row.tensor]:
                continue
            value = np.concatenate([part for _, part in sorted(found.items())], axis=-1)
        if "{}" in row.tensor:
            for layer, single in enumerate(value):
                if not re.fullmatch(family.identities, row.tensor.format(layer)):
                    yield name.format(layer), np.ascontiguousarray(single.T if row.transpose else single)
        else:
            yield name, np.ascontiguousarray(value.T if row.transpose else value)


def _unexpected(tensor: str) -> str:
    """What is wrong with a tensor that has no place in the model."""
    if re.match(r"score\.|v_head\.|\w*(value|reward|regression|gating)\w*\.", tensor):
        return (
            f"is part of a head that is not known; known are linear layers named {', '.join(('score', *VALUE_HEADS))}"
        )
    return "is not part of this architecture"


def _drawn(row: Row, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
    """The first values of an array of a new head."""
    if not row.path.endswith("kernel"):
        return np.full(shape, float(row.path.endswith("scale")), np.float32)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(row.path.encode()))
    return np.asarray(std * jax.random.normal(key, shape))


def head_rows(model: Model) -> list[Row]:
    """The rows of the head's table that the model has arrays for."""
    paths = {".".join(path) for path, _ in _flatten(model.abstract_params().get("head", {}))}
    return [row for row in model.head_kind.rows if row.path in paths]


def _row(family: Family, model: Model, path: tuple[str, ...]) -> Row:
    """The table's row for one array of the (stacked) parameters."""
    rows = model.head_kind.rows if path[0] == "head" else family.rows
    wanted = ".".join(path[1:])
    return next(row for row in rows if row.path.replace(".{}", "") == wanted)


def columns_of(family: Family, model: Model) -> tuple[dict[str, range], collections.Counter[str]]:
    """Where the last dimension of each row's array lies in its tensor, by path, and the width of every tensor, by
    name."""
    sizes = {_row(family, model, path).path: leaf.shape[-1] for path, leaf in _flatten(model.abstract_params())}
    columns: dict[str, range] = {}
    widths: collections.Counter[str] = collections.Counter()
    for row in (*family.rows, *model.head_kind.rows):
        if row.path in sizes:
            columns[row.path] = range(widths[row.tensor], widths[row.tensor] + sizes[row.path])
            widths[row.tensor] += sizes[row.path]
    return columns, widths


def _flatten(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, name))
        else:
            yield (*path, name), value


def _set(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _list(items: list[str]) -> str:
    return "; ".join(items[:3]) + (f" (and {len(items) - 3} more)" if len(items) > 3 else "")
