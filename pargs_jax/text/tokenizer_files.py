"""Loads a transformers tokenizer from a folder or the hub, and checks that it has its vocabulary.

If the files with the vocabulary are missing, transformers makes a tokenizer of only the special tokens, which turns all
texts into the same few ids. Here that is an error that names the files.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pargs_jax.errors import InputError, first_line, warn
from pargs_jax.json_text import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""The form of a model's or data set's name on the hub: `name` or `owner/name`."""

_WHOLE = ("tokenizer.json",)
"""Holds the vocabulary of any tokenizer; if it exists, other files are not read."""

_VOCABULARIES = (_WHOLE, ("tokenizer.model",), ("spm.model",), ("vocab.json", "merges.txt"))
"""Groups of files that together hold a vocabulary."""

_LARGEST_UNMADE_SHARE = 0.01
"""The largest share of a vocabulary that may be tokens that no merge makes; usually a few special ones."""


def load_tokenizer(source: str | Path) -> "PreTrainedTokenizerBase":
    """Loads from a local folder or else from the hub. Code that comes with a tokenizer is never run.

    Raises InputError if `source` is neither, or if its tokenizer cannot be read or lacks part of its vocabulary.
    """
    folder = Path(source) if Path(source).is_dir() else None
    if folder is None and not HUB_ID.fullmatch(str(source)):
        raise InputError(f"tokenizer {str(source)!r}: no such folder, and not a hub id such as openai-community/gpt2")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=False, local_files_only=folder is not None
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and plain Exception here
        if folder is None:
            reason = f"no such folder, and the hub has no such tokenizer: {first_line(error)}"
        else:
            reason = _broken_json(folder) or _without_vocabulary(
                folder, _VOCABULARIES, f"cannot be read; it may be damaged or cut off ({first_line(error)})"
            )
        raise InputError(f"tokenizer {str(source)!r}: {reason}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}:
        own = tuple(name for name in tokenizer.vocab_files_names.values() if name not in _WHOLE)
        reason = _without_vocabulary(folder, (_WHOLE, own) if own else (_WHOLE,), "has no tokens")
        raise InputError(f"tokenizer {str(source)!r}: {reason}")
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise InputError(f"tokenizer {str(source)!r}: model_max_length is {longest!r}, must be a number")
    if folder is not None:
        _check_merges(folder, tokenizer)
        if type(tokenizer) is PreTrainedTokenizerFast and not (folder / _WHOLE[0]).exists():
            warn(
                f"{folder}: has no tokenizer_config.json with the tokenizer's class; texts may be split differently "
                "than in training, without a beginning-of-sequence token or a leading space"
            )
    return tokenizer


def _without_vocabulary(folder: Path | None, vocabularies: tuple[tuple[str, ...], ...], fault: str) -> str:
    """Names the missing files if no vocabulary is complete; otherwise returns the message `fault`.

    If a vocabulary is there in part, its other files are the missing ones.
    """
    present = [[name for name in names if folder and (folder / name).exists()] for names in vocabularies]
    for names, found in zip(vocabularies, present, strict=True):
        if len(found) == len(names):
            return f"{' with '.join(names)} {fault}"
    incomplete = [names for names, found in zip(vocabularies, present, strict=True) if found]
    missing = [name for names in (*(incomplete or vocabularies[1:]), _WHOLE) for name in names if [name] not in present]
    return f"its vocabulary is missing: there is no {' or '.join(filter(None, (', '.join(missing[:-1]), missing[-1])))}"


def _broken_json(folder: Path) -> str:
    """A message that names a file of the folder that is not JSON; empty if there is none."""
    for name in (*_WHOLE, "vocab.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        try:
            parse_json((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return f"{name} cannot be read; it may be damaged or cut off ({first_line(error)})"
    return ""


def _check_merges(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises InputError if merges.txt makes too few of the tokens in vocab.json. (A truncated merges.txt is still
    valid.)"""
    if (folder / _WHOLE[0]).exists() or not (folder / "merges.txt").exists() or not (folder / "vocab.json").exists():
        return
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    made = {"".join(line.split(" ")) for line in lines if not line.startswith("#version")}
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    merged = [token for token in parse_json((folder / "vocab.json").read_bytes()) if len(token) > 1]
    unmade = [token for token in merged if token not in made and token not in special]
    if len(unmade) > _LARGEST_UNMADE_SHARE * len(merged):
        raise InputError(
            f"tokenizer {str(folder)!r}: merges.txt does not make {len(unmade)} of the {len(merged)} tokens in "
            "vocab.json; it is incomplete or belongs to another tokenizer"
        )
