"""Hugging Face checkpoints, in and out.

Reads a local folder or a hub id (safetensors, whole or sharded; never pickle), and writes a folder that
`transformers` loads with equal outputs.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from pargs_jax.durable_files import files_together
from pargs_jax.errors import InputError, input_errors_named_after, warn
from pargs_jax.models.adapters import Adapter
from pargs_jax.models.config_fields import TOKEN_IDS
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.heads import CAUSAL_HEADS, CLASSIFIER
from pargs_jax.models.int8 import quantise_layers
from pargs_jax.models.labels import label_names, label_shares
from pargs_jax.models.lora import join_params
from pargs_jax.models.model import HeadName, Model, Params, stack_layers
from pargs_jax.models.preference_lora import ADDITIONS, PreferenceLora, read_additions, split_additions
from pargs_jax.models.sources import ADAPTER_CONFIG, CONFIGS, find, resolve, split_source
from pargs_jax.models.weights import (
    INDEX,
    export_tensors,
    head_rows,
    import_params,
    open_tensors,
    read_json,
    settle_tied_head,
    share_tied_table,
)
from pargs_jax.sharding import place_computed

IN_PLACE_OF_REWARD = "value"
"""The head that a checkpoint may have where a reward head is asked for; it cannot be asked for itself."""


class Pretrained(NamedTuple):
    """A model read from a folder. `new_head` says that the checkpoint has no such head, so the model's head is random.

    `prompt_form` is the prompt form that the model was trained with, if the checkpoint says so.
    """

    model: Model
    params: Params
    new_head: bool
    special_tokens: dict[str, Any]
    eos_ids: tuple[int, ...]
    prompt_form: str | None = None


def load_model(
    source: str | os.PathLike[str],
    head: HeadName,
    *,
    attention: Literal["full", "prefix_causal"] | None = None,
    dtype: DTypeLike = jnp.float32,
    int8: bool = False,
    from_scratch: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Loads a checkpoint of a known family as a language model or a reward model, layers stacked. With `int8`, the
    matrices of the layers are rounded as they are read (`pargs_jax.models.int8`), and `dtype` is that of all else.

    `attention` overrides the attention of a DeBERTa checkpoint. A head that the checkpoint lacks is drawn at random
    from `seed` (`new_head`). With `from_scratch` only the config is read, and all parameters are drawn at random. A
    language model that stores its own head keeps it, even where its config ties the head to the embeddings.

    An adapter (`pargs_jax.models.sources`) is merged into the matrices as they are read, in fp32. Where it changes a
    tied head or its embeddings, the model that is loaded has both matrices, as PEFT changes the two separately.

    A classifier with several labels becomes a reward model by the label, or the mix of labels, at the source's end
    (`label_shares`).

    Raises InputError for an unknown architecture, an unknown field or an unsupported value in the config, a head or an
    attention that the model does not have, a checkpoint or an adapter that does not match its config, weights that are
    not floating-point or not finite, and a label that is missing or that the model does not have.
    """
    found, label = find(source), split_source(source).label
    folder = found.model
    hf = _read_config(folder)
    family = FAMILIES[hf.model_type]
    adapter = None if found.adapter is None else Adapter.open(found.adapter)
    model = _describe(folder, hf, head, attention)
    special = {name: getattr(hf, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos_ids = _eos_ids(folder, special["eos_token_id"])
    if label is not None and (from_scratch or model.head_kind.labels(model.config) is None):
        raise InputError(f"{source}: only the weights of a classifier have labels; leave out #{label}")
    if from_scratch:
        params = place_computed(lambda key: jax.tree.map(lambda x: x.astype(dtype), model.init(key)), seed)
        if int8:
            model, params = dataclasses.replace(model, int8=True), quantise_layers(params)
        return Pretrained(model, params, True, special, eos_ids)
    tensors = open_tensors(folder, family)
    kind = model.head_kind
    is_tied = kind.may_be_tied and model.config.tied_embeddings
    if is_tied:
        share_tied_table(model, family, tensors)
    if adapter is not None:
        adapter.join(tensors, family)
    if is_tied:
        model = settle_tied_head(model, family, tensors, folder)
    if kind is CAUSAL_HEADS["reward"] and "score.bias" in tensors:
        model = dataclasses.replace(model, head=IN_PLACE_OF_REWARD)
        kind = model.head_kind
    has_head = all(row.tensor in tensors for row in head_rows(model))
    new_head = kind.may_be_new and not has_head
    if label is not None and new_head:
        raise InputError(f"{source}: is not a classifier, so it has no labels; leave out #{label}")
    shares = None
    if has_head and kind.labels(model.config) is not None:
        count = next(iter(tensors[kind.rows[-1].tensor].shape), 1)
        shares = label_shares(str(source).removesuffix(f"#{label}"), label_names(hf, count), label)
    params = import_params(model, family, tensors, folder, np.dtype(dtype), new_head, seed, shares, int8=int8)
    model = dataclasses.replace(model, int8=int8)
    if (additions := getattr(hf, "pargs_preference_lora", None)) is not None:
        model = dataclasses.replace(model, lora=PreferenceLora.of_config(additions, folder))
        params = join_params(params, read_additions(folder, model, np.dtype(dtype)))
    form = getattr(hf, "pargs_prompt_form", None) if adapter is None else adapter.prompt_form
    return Pretrained(model, params, new_head, special, eos_ids, form)


def describe_model(
    source: str | os.PathLike[str], head: HeadName, *, attention: Literal["full", "prefix_causal"] | None = None
) -> Model:
    """The model that `load_model` would load, from `config.json` alone: no weights are read or downloaded."""
    folder = resolve(source, patterns=CONFIGS)
    return _describe(folder, _read_config(folder), head, attention)


def _describe(folder: Path, hf: Any, head: HeadName, attention: str | None) -> Model:
    family = FAMILIES[hf.model_type]
    with input_errors_named_after(folder / "config.json"):
        config = family.config.from_hf(hf)
    if attention is not None:
        if not hasattr(config, "attention"):
            raise InputError(
                f"{folder}: {hf.model_type} has only one kind of attention, so the option attention does not apply; "
                "leave it out"
            )
        config = dataclasses.replace(config, attention=attention)
    model = family.model(config, head)
    names = [name for name in CAUSAL_HEADS if name != IN_PLACE_OF_REWARD]
    if head not in names:
        raise InputError(f"head: got {head!r}, must be one of {', '.join(names)}")
    if head not in model.heads:
        reason = "is not a language model" if head == "vocabulary" else f"cannot have the head {head!r}"
        raise InputError(f"{folder}: {hf.model_type} {reason}; it can only be a reward model")
    marked = getattr(hf, "pargs_head", None)
    if marked not in (None, head):
        raise InputError(f"{folder}: its head is a {marked} (pargs_head in config.json), not a {head} head")
    if model.head_kind.is_marked and marked is None:
        warn(f"{folder}: config.json has no pargs_head, so the logits are taken as rewards of the next tokens")
    return model


def takes_preferences(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint's config.json says that the model takes a preference vector."""
    path = resolve(source, patterns=CONFIGS) / "config.json"
    return path.is_file() and read_json(path).get("pargs_preference_lora") is not None


def stored_head(source: str | os.PathLike[str]) -> HeadName | None:
    """The head of a checkpoint according to config.json: `pargs_head`, or else the name of its class. None if neither
    tells. An adapter's config says it itself."""
    folder, adapter = find(source, patterns=CONFIGS)
    if adapter is not None and (head := Adapter.open(adapter).head) is not None:
        return head
    hf = _read_config(folder)
    if (marked := getattr(hf, "pargs_head", None)) is not None:
        return marked
    names = getattr(hf, "architectures", None) or [""]
    if names[0].endswith(CLASSIFIER):
        return "reward"
    return "vocabulary" if names[0].endswith(("ForCausalLM", "LMHeadModel")) else None


def stored_labels(source: str | os.PathLike[str]) -> list[str]:
    """The names of a classifier's labels according to config.json; empty for an adapter, whose tensors decide."""
    folder, adapter = find(source, patterns=CONFIGS)
    return [] if adapter is not None else label_names(hf := _read_config(folder), hf.num_labels)


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

    Files get their names only when they are complete. A reward model becomes `...ForSequenceClassification` with one
    label. transformers reads a causal one at the last token that is not padding: give it a `pad_token_id` that is not
    the end-of-sequence token, or score one text at a time. It leaves out the bias of a value head, so all its rewards
    differ by that number. It does not know prefix-causal attention: a DeBERTa trained with it has full attention there.
    """
    import transformers
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    if model.int8:
        raise ValueError("a model in int8 is for decoding only; save the model that it was made from")
    model, params = stack_layers(model, params)
    additions: dict[str, np.ndarray] = {}
    extra: dict[str, Any] = {}
    if isinstance(model.lora, PreferenceLora):
        extra["pargs_preference_lora"] = dataclasses.asdict(model.lora)
        additions, params = split_additions(params)
        model = dataclasses.replace(model, lora=None)
    fields = model.config.to_hf()
    name = fields.pop("model_type")
    family = FAMILIES[name]
    exported = export_tensors(model, family, params)
    if jax.process_index() > 0:  # every process takes part in gathering sharded arrays; only the first writes them
        collections.deque(exported, maxlen=0)
        return
    tensors = dict(exported)
    labels = model.head_kind.labels(model.config)
    if labels is not None:
        extra["num_labels"] = labels
    if model.head_kind.is_marked:
        extra["pargs_head"] = model.head
    if prompt_form is not None:  # transformers keeps fields that it does not know
        extra["pargs_prompt_form"] = prompt_form
    hf = transformers.AutoConfig.for_model(name, **fields, **extra, **(special_tokens or {}))
    hf.architectures = [family.class_name(model)]
    hf.dtype = str(next(iter(tensors.values())).dtype)

    target = Path(folder)
    with files_together(target) as partial:
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
        if additions:
            save_file(additions, partial / ADDITIONS)
        written = {file.name for file in partial.iterdir()}
    for old in [*sorted(target.glob("model*.safetensors*"), reverse=True), *target.glob(ADDITIONS)]:
        # The index is removed before the files that it names.
        if old.name not in written:
            old.unlink()


def _read_config(folder: Path) -> Any:
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: has no config.json, so it is not a Hugging Face model folder")
    fields = read_json(path)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{path}: architecture {kind!r} is not known; known are {', '.join(sorted(FAMILIES))}")
    with input_errors_named_after(path):
        FAMILIES[kind].config.HF_FIELDS.check(fields)
    if fields.get("auto_map"):
        warn(f"{path}: has custom code (auto_map), which is not run; the model is read as an ordinary {kind}")
    if (folder / ADAPTER_CONFIG).is_file():
        warn(
            f"{folder}: has weights of its own, so the adapter in {ADAPTER_CONFIG} is not applied; to use it, give "
            "MODEL+ADAPTER"
        )
    try:
        hf = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())  # the first line alone often says little
        raise InputError(f"{path}: transformers cannot read it ({reason})") from error
    if hf.model_type not in FAMILIES:  # as it does for a Mistral with layer_types
        raise InputError(f"{path}: transformers takes it for a {hf.model_type}, which is not known")
    return hf


def _eos_ids(folder: Path, eos: int | list[int] | None) -> tuple[int, ...]:
    """The end-of-sequence ids of config.json and generation_config.json (Llama 3 has several)."""
    found = [eos]
    generation = folder / "generation_config.json"
    if generation.is_file():
        found.append(read_json(generation).get("eos_token_id"))
        if not TOKEN_IDS.holds(found[-1]):
            raise InputError(f"{generation}: eos_token_id is {found[-1]!r}, must be {TOKEN_IDS.words}")
    flat = [i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    return tuple(dict.fromkeys(flat))
