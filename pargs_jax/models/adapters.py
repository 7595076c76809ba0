"""LoRA adapters of PEFT: merged into a model's matrices as these are read, and written after training.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. The latter holds two thin matrices
for each adapted layer, `B A` scaled by `alpha / rank`, and whole tensors for `modules_to_save`, such as a reward head.
The matrices of the token embeddings have other names and are transposed: A is `[rank, vocabulary]`, B `[width, rank]`.
"""

import dataclasses
import json
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pargs_jax.durable_files import files_together
from pargs_jax.errors import InputError, input_errors_named_after
from pargs_jax.models.config_fields import EMPTY, FALSE, NOT_SET, ConfigFields, Requirement
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.family import Family
from pargs_jax.models.heads import CAUSAL_HEADS, CLASSIFIER
from pargs_jax.models.lora import EMBED
from pargs_jax.models.model import Model, Params
from pargs_jax.models.sources import ADAPTER_CONFIG
from pargs_jax.models.weights import (
    ADAPTER,
    FLOATS,
    Addition,
    Stored,
    Tensors,
    columns_of,
    export_tensors,
    read_json,
    stored_in,
    token_table,
)
from pargs_jax.sharding import to_host

PREFIX = "base_model.model."
"""Before the name of every tensor."""
EMBEDDING = "embedding_"
"""Before the names of the two matrices of embeddings."""
PROMPT_FORM = "pargs_prompt_form"
"""In the metadata of the file with the tensors: the prompt form of training."""

UNCHANGED_BASE = (None, True, False, "gaussian", "orthogonal", "eva")

FIELDS = ConfigFields(
    sizes=("r",),
    names={},
    read=(
        "peft_type", "task_type", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
        "base_model_name_or_path", "revision",
    ),
    harmless=(
        # Which layers are adapted, and how they are stored: the tensors tell.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
        "fan_in_fan_out", "ensure_weight_tying",
        # Training and its beginning; versions.
        "lora_dropout", "inference_mode", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "auto_mapping", "peft_version",
    ),
    must={
        "peft_type": Requirement("LORA; adapters of other kinds cannot be read", lambda value: value == "LORA"),
        "use_dora": FALSE,
        "bias": Requirement("none", lambda value: value in (None, "none")),
        "lora_bias": FALSE,
        "use_qalora": FALSE,
        "use_bdlora": EMPTY,
        "layer_replication": EMPTY,
        "trainable_token_indices": EMPTY,
        "target_parameters": EMPTY,
        **{name: NOT_SET for name in (
            "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
        )},
        "init_lora_weights": Requirement(
            "true, false, gaussian, orthogonal or eva; with others, such as pissa, the model's own matrices change too",
            lambda value: value in UNCHANGED_BASE,
        ),
    },
)  # fmt: skip


class Adapter(NamedTuple):
    """An adapter's checked config, and where its tensors are."""

    folder: Path
    fields: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Reads the config of an adapter. Raises InputError for one that is not a LoRA, or of a kind that is not
        supported."""
        path = folder / ADAPTER_CONFIG
        fields = read_json(path)
        with input_errors_named_after(path):
            FIELDS.check({"peft_type": None, **fields})
            for name in ("rank_pattern", "alpha_pattern"):
                pattern = fields.get(name) or {}
                if not isinstance(pattern, dict) or not all(map(_is_positive, pattern.values())):
                    raise InputError(f"{name} is {pattern!r}, must be an object of numbers above 0")
                for layers in pattern:
                    _check_pattern(name, layers)
            if not _is_positive(fields.get("lora_alpha", 8)):
                raise InputError(f"lora_alpha is {fields['lora_alpha']!r}, must be a number above 0")
        return cls(folder, fields)

    @property
    def head(self) -> str | None:
        """The kind of head that the adapter was trained with."""
        return {"SEQ_CLS": "reward", "CAUSAL_LM": "vocabulary"}.get(self.fields.get("task_type"))

    @property
    def prompt_form(self) -> str | None:
        from safetensors import safe_open

        with safe_open(self.folder / ADAPTER, framework="numpy") as file:
            return (file.metadata() or {}).get(PROMPT_FORM)

    def join(self, tensors: Tensors, family: Family) -> None:
        """Adds the adapter to a checkpoint's tensors. Nothing is merged before it is read.

        Raises InputError for tensors that are no part of a LoRA adapter, for halves of pairs, and for layers that the
        checkpoint does not have.
        """
        path = self.folder / ADAPTER
        if not path.is_file():
            raise InputError(f"{self.folder}: has no {ADAPTER}; adapters are read from safetensors only")
        table = token_table(family)
        halves: dict[str, dict[str, Stored]] = {}
        for stored in stored_in(path):
            layer, half, module = _parse(stored)
            if stored.format not in FLOATS:
                raise InputError(f"{path}: {stored.name} is stored as {stored.format}, must be {', '.join(FLOATS)}")
            if half is None:
                name = family.name_in_rows(module)
                tensors[name] = stored
                tensors.additions.pop(name, None)
            else:
                halves.setdefault(layer, {})[half] = stored
        for layer, pair in halves.items():
            name = family.name_in_rows(f"{layer}.weight")
            _check_pair(path, layer, pair, is_table=name == table)
            if name not in tensors:
                raise InputError(f"{path}: adapts {layer}, which the model's checkpoint does not store")
            a, b = (pair[half] for half in sorted(pair))
            if not _fit(a.shape, b.shape, tensors[name].shape, is_table=name == table):
                raise InputError(
                    f"{path}: the matrices of {layer} have shapes {b.shape} and {a.shape}, that of the model "
                    f"{tensors[name].shape}"
                )
            tensors.additions[name] = Addition(a, b, self._scale(layer, a.shape[0]))

    def _scale(self, layer: str, rank: int) -> float:
        alpha = self.fields.get("lora_alpha", 8)
        for pattern, value in (self.fields.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
                break
        return alpha / (rank**0.5 if self.fields.get("use_rslora") else rank)


def _parse(stored: Stored) -> tuple[str, str | None, str]:
    """A tensor's layer, its half of a pair (`A`, `B`, `embedding_A`, `embedding_B`, or None for a whole tensor), and
    its name in a checkpoint. PEFT may store the model's own embeddings too, as those of a `base_layer`."""
    name = re.sub(r"\.(modules_to_save|base_layer|default)(?=\.)", "", stored.name.removeprefix(PREFIX))
    is_other = re.search(r"\.original_module\.|lora_(?!([AB]\.weight|embedding_[AB])$)", name)
    if is_other or not stored.name.startswith(PREFIX):
        raise InputError(
            f"{stored.path}: {stored.name} is not a part of a LoRA adapter for linear layers or embeddings"
        )
    layer, sign, half = name.removesuffix(".weight").rpartition(".lora_")
    return (layer, half, name) if sign else (name, None, name)


def _check_pair(path: Path, layer: str, pair: dict[str, Stored], *, is_table: bool) -> None:
    """Raises InputError unless these are both matrices of a linear layer, or of the table of token embeddings."""
    names = " and ".join(f"lora_{half}" for half in sorted(pair))
    if len(pair) == 1:
        raise InputError(f"{path}: {layer} has {names} alone")
    if pair.keys() != ({f"{EMBEDDING}A", f"{EMBEDDING}B"} if is_table else {"A", "B"}):
        raise InputError(
            f"{path}: {layer} has {names}; token embeddings must have lora_{EMBEDDING}A and lora_{EMBEDDING}B, and all "
            "other layers lora_A and lora_B, because no other embeddings can be adapted"
        )


def _fit(a: tuple[int, ...], b: tuple[int, ...], own: tuple[int, ...], *, is_table: bool) -> bool:
    """Whether the shapes of A and B give a product of the shape of a stored matrix."""
    if len(a) != 2 or b[1:] != a[:1]:
        return False
    # The layers of GPT-2 are stored the other way round, as tables are.
    return own == (a[1], b[0]) or (own == (b[0], a[1]) and not is_table)


def _check_pattern(field: str, layers: str) -> None:
    try:
        re.compile(layers)
    except re.error as error:
        raise InputError(f"{field} has {layers!r}, must be a regular expression ({error})") from None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def export_adapter(
    folder: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    base: str,
    revision: str | None = None,
    prompt_form: str | None = None,
) -> None:
    """Writes the low-rank additions of a model with stacked layers, and its head if that was trained, as a folder that
    PEFT loads. All processes must call this; the first writes.

    Layers that are one tensor in checkpoints (`qkv_proj` of Phi-3) are one layer for PEFT too. Its two matrices then
    hold those of its parts, beside each other and as blocks, and its rank is the sum of theirs.

    Raises ValueError for a table that is adapted and tied to the head (`adapts_tied_table`).

    Args:
        folder: where to write.
        model, params: the model with its additions, which are not merged.
        base, revision: the model that it was trained from, as PEFT would load it.
        prompt_form: the prompt form of training.
    """
    from safetensors.numpy import save_file

    if adapts_tied_table(model):
        raise ValueError("PEFT merges additions to a table twice if the head is tied to it; save the merged model")
    family = FAMILIES[model.config.to_hf()["model_type"]]
    matrices, ranks = map(operator.or_, _matrices(model, family, params), _matrices_outside(model, family, params))
    heads = _trained_head(model, family, params)
    if jax.process_index() > 0:
        return
    lora = model.lora
    larger = {tensor: rank for tensor, rank in ranks.items() if rank != lora.rank}
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.head_kind.class_suffix == CLASSIFIER else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": not all(row.transpose for row in family.rows if row.tensor in ranks and "{}" in row.tensor),
        "target_modules": "|".join(_pattern(_name_in_peft(family, tensor)) for tensor in ranks),
        "rank_pattern": {_pattern(tensor): rank for tensor, rank in larger.items()},
        "alpha_pattern": {_pattern(tensor): lora.scale * rank for tensor, rank in larger.items()},
        "modules_to_save": sorted({name.split(".")[0] for name in heads}) or None,
    }
    metadata = {"format": "pt"} | ({} if prompt_form is None else {PROMPT_FORM: prompt_form})
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (matrices | heads).items()}
    with files_together(Path(folder)) as partial:
        (partial / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        save_file(tensors, partial / ADAPTER, metadata=metadata)


def _matrices(model: Model, family: Family, params: Params) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The two matrices of every adapted layer of the blocks, by their names; and the rank of every adapted tensor, by
    its name in the table."""
    columns, widths = columns_of(family, dataclasses.replace(model, lora=None))
    parts: dict[str, list[tuple[range, np.ndarray, np.ndarray]]] = {}
    for row in family.rows:
        name = re.fullmatch(r"layers\.\{\}\.(\w+)\.kernel", row.path)
        layer = params["backbone"]["layers"].get(name[1], {}) if name else {}
        if "lora_in" in layer:
            both = to_host(layer["lora_in"]), to_host(layer["lora_out"])
            parts.setdefault(row.tensor, []).append((columns[row.path], *both))
    found: dict[str, np.ndarray] = {}
    for tensor, pieces in parts.items():
        for number in range(model.config.layers):
            rows = [ins[number].T for _, ins, _ in pieces]
            blocks = [np.zeros((widths[tensor], len(part)), part.dtype) for part in rows]
            for block, (place, _, outs) in zip(blocks, pieces, strict=True):
                block[place.start : place.stop] = outs[number].T
            layer = _name_in_peft(family, tensor.format(number)).removesuffix(".weight")
            found[f"{layer}.lora_A.weight"] = np.ascontiguousarray(np.concatenate(rows))
            found[f"{layer}.lora_B.weight"] = np.concatenate(blocks, axis=1)
    return found, {tensor: len(pieces) * model.lora.rank for tensor, pieces in parts.items()}


def _matrices_outside(model: Model, family: Family, params: Params) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The same of the layers outside the blocks: token embeddings, and a vocabulary head."""
    found: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for tensor, form, above, name in (
        (token_table(family), f"lora_{EMBEDDING}{{}}", "backbone", EMBED),
        (model.head_kind.rows[0].tensor, "lora_{}.weight", "head", "linear"),
    ):
        like, layer = (tree.get(above, {}).get(name, {}) for tree in (model.abstract_params(), params))
        if "lora_in" in like:
            ranks[tensor] = model.lora.rank
            for half, end in (("A", "lora_in"), ("B", "lora_out")):
                array = to_host(layer[end])[tuple(map(slice, like[end].shape))]  # without the padding of a vocabulary
                peft_layer = _name_in_peft(family, tensor).removesuffix(".weight")
                found[f"{peft_layer}.{form.format(half)}"] = np.ascontiguousarray(array.T)
    return found, ranks


def _trained_head(model: Model, family: Family, params: Params) -> dict[str, np.ndarray]:
    """The tensors of a head that LoRA training trains in full, by their names."""
    if not model.head_kind.may_be_new:
        return {}
    without = dataclasses.replace(model, lora=None)
    rows = {row.tensor for row in model.head_kind.rows}
    exported = export_tensors(without, family, {"head": params["head"]})
    return {name: tensor for name, tensor in exported if name in rows}


def adapts_tied_table(model: Model) -> bool:
    """Whether a model has an addition to token embeddings that its head is tied to. For PEFT, head and embeddings are
    two layers on one matrix: with one addition to each it computes the same, but merges both into the matrix."""
    return model.head_kind.may_be_tied and model.config.tied_embeddings and model.lora.reaches(EMBED)


def _name_in_peft(family: Family, tensor: str) -> str:
    """A tensor's name in a model of transformers, of its name in a table. There the head of GPT-NeoX has the name that
    it has here; only its checkpoints have another."""
    is_of_head = tensor in {row.tensor for head in CAUSAL_HEADS.values() for row in head.rows}
    return tensor if is_of_head else family.backbone_prefix + tensor


def _pattern(tensor: str) -> str:
    """A regular expression for the names of a tensor's layers."""
    return re.escape(tensor.removesuffix(".weight")).replace(r"\{\}", r"\d+")
