"""Hugging Face checkpoints, in and out.

Reads a local folder or a hub id (safetensors, whole or sharded; never pickle), and writes a folder that
`transformers` loads with equal outputs.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from pargs_jax.errors import InputError, first_line
from pargs_jax.models.layers import ACTIVATIONS
from pargs_jax.models.model import HeadName, Model, Params, stack_layers
from pargs_jax.models.tables import FAMILIES, Family, Row
from pargs_jax.sharding import map_paths, place_computed, place_param, to_host

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
EXPORTED = "model"
"""Where a training run's folder has its result."""


class Pretrained(NamedTuple):
    """A model read from a folder. `new_head` says that its head is random: the checkpoint has none of the kind.

    `prompt_form` is the one that it was trained with, if it says so.
    """

    model: Model
    params: Params
    new_head: bool
    special_tokens: dict[str, Any]
    eos_ids: tuple[int, ...]
    prompt_form: str | None = None


def resolve(source: str | os.PathLike[str], patterns: Sequence[str] = DOWNLOADED) -> Path:
    """The folder of a local path, of a training run (its exported model), or of a hub id (downloaded: safetensors,
    configs and tokenizer files only)."""
    folder = Path(source)
    if folder.is_dir():
        exported = folder / EXPORTED
        return exported if exported.is_dir() and not (folder / "config.json").exists() else folder
    if folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1 or folder.exists():
        raise InputError(f"{source}: no such folder; a model is a Hugging Face folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:
        raise InputError(
            f"{source}: neither a local folder nor a model that the hub gives ({first_line(error)})"
        ) from error


def load_model(
    source: str | os.PathLike[str],
    head: HeadName,
    *,
    attention: Literal["full", "prefix_causal"] | None = None,
    dtype: DTypeLike = jnp.float32,
    from_scratch: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Loads a checkpoint of a known family as a language model or a reward model, layers stacked.

    `attention` chooses that of a DeBERTa, where it is not to be as the checkpoint says. A head that the checkpoint
    lacks is drawn at random from `seed` (`new_head`); so is everything with `from_scratch`, which reads the config
    alone. Raises InputError for an unknown architecture, a head or an attention that it does not have, a checkpoint
    that does not match its config, or a classifier with more than one label.
    """
    folder = resolve(source)
    hf = _read_config(folder)
    family = FAMILIES[hf.model_type]
    model = _describe(folder, hf, head, attention)
    special = {name: getattr(hf, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos_ids = _eos_ids(folder, special["eos_token_id"])
    if from_scratch:
        params = place_computed(lambda key: jax.tree.map(lambda x: x.astype(dtype), model.init(key)), seed)
        return Pretrained(model, params, True, special, eos_ids)
    tensors = _open_tensors(folder, family)
    has_head = all(row.tensor in tensors for row in family.heads[head].rows)
    if head == "reward" and has_head and hf.num_labels != 1:
        raise InputError(f"{folder}: a reward model has one label; this classifier has {hf.num_labels}")
    new_head = head == "reward" and not has_head
    params = _import(model, family, tensors, folder, np.dtype(dtype), new_head, seed)
    return Pretrained(model, params, new_head, special, eos_ids, getattr(hf, "pargs_prompt_form", None))


def describe_model(
    source: str | os.PathLike[str], head: HeadName, *, attention: Literal["full", "prefix_causal"] | None = None
) -> Model:
    """What `load_model` would load, from `config.json` alone: no weights are read or downloaded."""
    folder = resolve(source, patterns=("config.json",))
    return _describe(folder, _read_config(folder), head, attention)


def _describe(folder: Path, hf: Any, head: HeadName, attention: str | None) -> Model:
    family = FAMILIES[hf.model_type]
    if head not in family.heads:
        raise InputError(f"{folder}: {hf.model_type} is no language model; it can be a reward model (--rm)")
    config = family.config.from_hf(hf)
    if attention is not None:
        if not hasattr(config, "attention"):
            raise InputError(f"{folder}: attention cannot be chosen for {hf.model_type}, which is causal")
        config = dataclasses.replace(config, attention=attention)
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"{folder}/config.json: activation {config.activation!r} is not known; known are {known}")
    return family.model(config, head)


def save_model(
    folder: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    special_tokens: Mapping[str, Any] | None = None,
    prompt_form: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Writes a Hugging Face folder (config.json and safetensors, sharded with an index where large).

    The files are complete before they take their names. A reward model becomes `...ForSequenceClassification` with one
    label. transformers reads a causal one at the last token that is not padding: give it a `pad_token_id` that is not
    the end-of-sequence token, or score one text at a time. It knows no prefix-causal attention: a DeBERTa trained so
    loads there, but attends fully.
    """
    import transformers
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    model, params = stack_layers(model, params)
    fields = model.config.to_hf()
    name = fields.pop("model_type")
    exported = _export(model, FAMILIES[name], params)
    if jax.process_index() > 0:  # all processes have to gather what is spread over them; the first one keeps it
        collections.deque(exported, maxlen=0)
        return
    tensors = dict(exported)
    extra = {"num_labels": 1} if model.head == "reward" else {}
    if prompt_form is not None:  # that it was trained with; transformers keeps fields that it does not know
        extra["pargs_prompt_form"] = prompt_form
    hf = transformers.AutoConfig.for_model(name, **fields, **extra, **(special_tokens or {}))
    hf.architectures = [FAMILIES[name].heads[model.head].class_name]
    hf.dtype = str(next(iter(tensors.values())).dtype)

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    partial = target / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    hf.save_pretrained(partial)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda x: x.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for filename, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, partial / filename, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
    written = {file.name for file in partial.iterdir()}
    for name in sorted(written):
        os.replace(partial / name, target / name)
    for old in sorted(target.glob("model*.safetensors*"), reverse=True):  # an index before what it names
        if old.name not in written:
            old.unlink()
    partial.rmdir()


def _read_config(folder: Path) -> Any:
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; a model is a Hugging Face folder")
    kind = _read_json(path).get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{path}: architecture {kind!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{path}: transformers cannot read it ({first_line(error)})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not a JSON object ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object")
    return content


def _eos_ids(folder: Path, eos: int | list[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids of config.json and generation_config.json (Llama 3 has several)."""
    found = [eos]
    generation = folder / "generation_config.json"
    if generation.is_file():
        found.append(_read_json(generation).get("eos_token_id"))
    flat = [i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(flat))


class _Tensors(dict[str, tuple[Path, str]]):
    """Where each tensor of a checkpoint lies, by its name without the backbone's prefix; read only when asked for."""

    def shape(self, row: Row, layer: int) -> tuple[int, ...]:
        """Of the tensor that a row names, or, where that is several arrays, of all of them side by side."""
        with self._open(row.tensor.format(layer)) as (file, stored):
            shape = tuple(file.get_slice(stored).get_shape())
            return shape[::-1] if row.transpose else shape

    def read(self, row: Row, layer: int, size: int, index: tuple[slice, ...]) -> np.ndarray:
        """What an index gives of the array that a row makes of a tensor; nothing else is read.

        `size` is that of the array's last dimension.
        """
        start, stop, _ = index[-1].indices(size)
        before = row.part[0] * size
        index = (*index[:-1], slice(before + start, before + stop))
        with self._open(row.tensor.format(layer)) as (file, stored):
            if row.transpose:
                return file.get_slice(stored)[index[::-1]].T
            return file.get_slice(stored)[index]

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, str]]:
        from safetensors import safe_open

        path, stored = self[name]
        with safe_open(path, framework="numpy") as file:
            yield file, stored


def _open_tensors(folder: Path, family: Family) -> _Tensors:
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX}: has no weight_map, which says where each tensor is")
        files = sorted({folder / name for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}; weights are read from safetensors only")
    tensors = _Tensors()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                tensors.update({family.without_prefix(name): (path, name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    return tensors


def _import(
    model: Model, family: Family, tensors: _Tensors, folder: Path, dtype: np.dtype, new_head: bool, seed: int
) -> Params:
    """Fills the model's parameters from the checkpoint, each read where it is to lie; every mismatch is collected and
    raised once, before any is read."""
    problems: list[str] = []
    used: set[str] = set()

    def check(row: Row, layer: int, shape: tuple[int, ...]) -> None:
        name = row.tensor.format(layer)
        if row.part[0] == 0:
            used.add(name)
            whole = (*shape[:-1], shape[-1] * row.part[1])
            if name not in tensors:
                problems.append(f"{name} is missing")
            elif (stored := tensors.shape(row, layer)) != whole:
                problems.append(f"{name} has shape {stored}, the config needs {whole}")

    def read(row: Row, size: int, index: tuple[slice, ...]) -> np.ndarray:
        if "{}" not in row.tensor:
            return tensors.read(row, 0, size, index)
        layers = range(model.config.layers)[index[0]]
        return np.stack([tensors.read(row, layer, size, index[1:]) for layer in layers])

    readers: Params = {}
    for path, leaf in _flatten(model.abstract_params()):
        row = _row(family, model.head, path)
        if path[0] == "head" and new_head:
            std = model.config.initializer_range if path[-1] == "kernel" else 0.0
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(row.path.encode()))
            _set(readers, path, np.asarray(std * jax.random.normal(key, leaf.shape)).__getitem__)
            continue
        if "{}" in row.tensor:
            for layer in range(leaf.shape[0]):
                check(row, layer, leaf.shape[1:])
        else:
            check(row, 0, leaf.shape)
        _set(readers, path, partial(read, row, leaf.shape[-1]))
    # A language model may be read as a reward model and the other way round: the other head is no mistake.
    used |= {row.tensor for head in family.heads.values() for row in head.rows}
    unexpected = [n for n in tensors if n not in used and not re.fullmatch(family.ignored, n)]
    problems += [f"{name} is not part of this architecture" for name in unexpected]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{folder}: the weights do not match config.json: {'; '.join(problems[:3])}{more}")
    return map_paths(
        lambda path, leaf, reader: place_param(path, leaf.shape, dtype, reader), model.abstract_params(), readers
    )


def _export(model: Model, family: Family, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    shapes = {path: leaf.shape for path, leaf in _flatten(model.abstract_params())}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in _flatten(params):
        row = _row(family, model.head, path)
        prefix = "" if path[0] == "head" else family.backbone_prefix
        value = to_host(leaf)[tuple(map(slice, shapes[path]))]  # without the padding of a sharded vocabulary
        place, count = row.part
        if count > 1:
            found = parts.setdefault(row.tensor, {})
            found[place] = value
            if len(found) < count:
                continue
            value = np.concatenate([found[place] for place in range(count)], axis=-1)
        if "{}" in row.tensor:
            for layer, single in enumerate(value):
                yield prefix + row.tensor.format(layer), np.ascontiguousarray(single.T if row.transpose else single)
        else:
            yield prefix + row.tensor, np.ascontiguousarray(value.T if row.transpose else value)


def _row(family: Family, head: HeadName, path: tuple[str, ...]) -> Row:
    """The table's row for one array of the (stacked) parameters."""
    rows = family.heads[head].rows if path[0] == "head" else family.rows
    wanted = ".".join(path[1:])
    return next(row for row in rows if row.path.replace(".{}", "") == wanted)


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
