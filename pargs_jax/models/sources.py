"""Where a model comes from, as a user names it: a run of `train.py`, a Hugging Face folder, or a hub id, with

MODEL@REVISION    a branch, a tag or a commit of a hub id
MODEL+ADAPTER     a PEFT adapter on a model of choice; an adapter alone is put on the model that it names
MODEL#LABEL       one label of a classifier with several, or a mix of them (`pargs_jax.models.labels`)
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pargs_jax.errors import InputError, first_line
from pargs_jax.models.weights import ADAPTER, INDEX, SINGLE, read_json

DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONFIGS = ("config.json", "adapter_config.json")
NOT_DOWNLOADED = ("consolidated*", "*/*")
"""Copies of the weights in other formats."""
EXPORTED = "model"
"""The subfolder of a training run that holds its exported model."""
EXPORTED_ADAPTER = "adapter"
"""The subfolder of a training run that holds its exported adapter."""
ADAPTER_CONFIG = "adapter_config.json"


class Named(NamedTuple):
    """The parts of a source."""

    model: str
    adapter: str | None
    label: str | None


class Found(NamedTuple):
    """The folders to read: the model's, and that of an adapter on it."""

    model: Path
    adapter: Path | None

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer: the adapter's if it has one, else the model's."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if has_own else self.model


def split_source(source: str | os.PathLike[str]) -> Named:
    """The parts of a source. A folder whose name contains one of the signs is a folder."""
    text = str(source)
    path, sign, label = text.rpartition("#")
    if not sign or Path(text).exists():
        path, label = text, None
    model, sign, adapter = path.rpartition("+")
    if not sign or Path(path).exists():
        model, adapter = path, None
    return Named(model, adapter, label)


def find(source: str | os.PathLike[str], patterns: Sequence[str] = DOWNLOADED) -> Found:
    """The folders that a source names: local ones, a training run's exported model, or a hub id's, which is downloaded
    as far as `patterns` say.

    Raises InputError for what is not there, and for an adapter whose model is not there.
    """
    named = split_source(source)
    model = _folder(named.model, patterns)
    if named.adapter is not None:
        adapter = _folder(named.adapter, patterns, EXPORTED_ADAPTER)
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise InputError(f"{adapter}: has no {ADAPTER_CONFIG}, so it is not a PEFT adapter")
        if _is_adapter(model):
            raise InputError(f"{model}: is an adapter itself; name the model that both adapters were merged into")
        return Found(model, adapter)
    return Found(_model_of(model, patterns), model) if _is_adapter(model) else Found(model, None)


def resolve(source: str | os.PathLike[str], patterns: Sequence[str] = DOWNLOADED) -> Path:
    """The folder of the model that a source names (`find`)."""
    return find(source, patterns).model


def tokenizer_folder(source: str | os.PathLike[str]) -> Path:
    """The folder with a source's tokenizer."""
    return find(source).tokenizer


def _is_adapter(folder: Path) -> bool:
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    has_weights = any((folder / name).is_file() for name in (SINGLE, INDEX))
    return not (folder / "config.json").is_file() or ((folder / ADAPTER).is_file() and not has_weights)


def _model_of(adapter: Path, patterns: Sequence[str]) -> Path:
    """The folder of the model that an adapter names."""
    fields = read_json(adapter / ADAPTER_CONFIG)
    name, revision = (fields.get(field) for field in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        raise InputError(f"{adapter}: does not say which model it was made for; give it as MODEL+{adapter}")
    try:
        return _folder(f"{name}@{revision}" if revision and not Path(name).exists() else name, patterns)
    except InputError as error:
        raise InputError(f"{adapter}: its model {name} was not found; give it as MODEL+{adapter}") from error


def _folder(source: str, patterns: Sequence[str], exported: str = EXPORTED) -> Path:
    folder = Path(source)
    if folder.is_dir():
        inner = folder / exported
        has_own = any((folder / name).exists() for name in CONFIGS)
        return inner if inner.is_dir() and not has_own else folder
    if folder.is_absolute() or source.startswith(".") or source.count("/") > 1 or folder.exists():
        raise InputError(f"{source}: no such folder; must be a Hugging Face folder or a hub id")
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    chosen: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        downloaded = snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=list(NOT_DOWNLOADED), **chosen
        )
    except Exception as error:
        what = f"no revision {revision} of such a model" if revision else "no such model"
        raise InputError(f"{source}: not a local folder, and the hub has {what} ({first_line(error)})") from error
    return Path(downloaded)
