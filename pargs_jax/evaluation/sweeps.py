"""Sweeps: every combination of some options' values, each a way to decode with an answers file of its own."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pargs_jax.config import DecodeConfig
from pargs_jax.config_files import from_mapping, from_text
from pargs_jax.decoding.methods import METHODS
from pargs_jax.errors import InputError
from pargs_jax.options import options, shown

NOT_SWEPT = ("out", "prompt", "compile_only", "distributed", "processes", "mesh", "compile_cache", "prompt_length")


class Setting(NamedTuple):
    """One way to decode: its name, which says the method and what differs, such as `pargs weight=2`; the name of its
    file, which says all that was swept; and its options."""

    name: str
    file: str
    config: DecodeConfig


def settings(words: Sequence[str], base: Mapping[str, Any], where: str = "sweep") -> list[Setting]:
    """Every combination of what `NAME=VALUE,...` words say, each on top of `base`, the options in the file `where`.

    A list, such as a weight for each of two reward models, is written with spaces: `weight=1 2,2 1`. A number that
    means nothing to a method (the weight of an unguided one) is left out for it, and what is then the same comes once.

    Raises InputError for a word of another shape, an option that `decode.py` does not have or that cannot be swept, a
    value that it cannot use, or no method.
    """
    known = {option.key: option for option in options(DecodeConfig)}
    swept: dict[str, list[str]] = {}
    for word in words:
        flag, equals, values = word.partition("=")
        name = flag.replace("-", "_")
        if not equals or not all(values.split(",")):
            raise InputError(f"sweep: got {shown(word)}, must be NAME=VALUE,..., such as weight=0.5,1,2")
        if name not in known or name in NOT_SWEPT or "." in name:
            possible = ", ".join(key.replace("_", "-") for key in known if key not in NOT_SWEPT and "." not in key)
            raise InputError(f"sweep: {flag!r} cannot be swept; must be one of decode.py's options {possible}")
        if name in swept:
            raise InputError(f"sweep: {flag} is given twice")
        swept[name] = values.split(",")
    found: dict[str, Setting] = {}
    for values in itertools.product(*swept.values()):
        chosen = dict(zip(swept, values, strict=True))
        method = chosen.get("method", base.get("method"))
        if method is None:
            raise InputError(f"sweep: needs a method; give method=NAME,... with names from {', '.join(METHODS)}")
        unused = METHODS[method].unused if method in METHODS else {}
        chosen = {name: value for name, value in chosen.items() if name not in unused}
        changes = {
            name: from_text(known[name], value.split() if known[name].many else value) for name, value in chosen.items()
        }
        cleared = {name: getattr(DecodeConfig(), name) for name in unused if name in known}
        config = from_mapping(DecodeConfig, {**base, **cleared, **changes}, where)
        told = {name: f"{name}={value}" for name, value in chosen.items() if name != "method"}
        name = " ".join([method, *(word for option, word in told.items() if len(swept[option]) > 1)])
        file = re.sub(r"[^\w=.+-]+", "_", "_".join([method, *told.values()])) + ".jsonl"
        found.setdefault(name, Setting(name, file, config))
    files = [setting.file for setting in found.values()]
    for setting in found.values():
        if files.count(setting.file) > 1:
            raise InputError(f"sweep: two settings would be written to {setting.file}; give values with other names")
    return list(found.values())
