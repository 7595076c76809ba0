"""Classifiers with several labels, of which one, or a mix, becomes the reward.

A label is chosen where the model is named: `PATH#helpfulness`, `PATH#0`, or `PATH#helpfulness=0.7,verbosity=-0.3`.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pargs_jax.errors import InputError


def split_label(source: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A source without its label, and the label, if it has one. A folder whose name contains the sign has none."""
    path, sign, label = str(source).rpartition("#")
    if not sign or Path(source).exists():
        return str(source), None
    return path, label


def label_shares(source: str, hf: Any, label: str | None) -> Float[np.ndarray, "labels"]:
    """How much each label of a classifier counts in the reward.

    Args:
        source: names the model in errors.
        hf: its transformers config, with its labels' names (`id2label`).
        label: a label's name or number; or several, each with its factor. None only if the classifier has one label.

    Raises InputError for a label that it does not have, and for several labels of which none is chosen.
    """
    names = [str(hf.id2label[number]) for number in range(hf.num_labels)]
    if label is None:
        if len(names) > 1:
            raise InputError(
                f"{source}: this classifier has {len(names)} labels ({', '.join(names)}); choose one, as in "
                f"{source}#{names[0]}, or mix them, as in {source}#{names[0]}=0.5,{names[1]}=0.5"
            )
        return np.ones(1, np.float32)
    shares = np.zeros(len(names), np.float32)
    for part in [label] if label in names else label.split(","):
        name, sign, factor = (part, "", "") if part in names else part.rpartition("=")
        name = name if sign else part
        if name in names:
            number = names.index(name)
        elif name.isdecimal() and int(name) < len(names):
            number = int(name)
        else:
            raise InputError(f"{source}#{label}: has no label {name!r}; it has {', '.join(names)}")
        try:
            shares[number] += float(factor) if sign else 1.0
        except ValueError:
            raise InputError(f"{source}#{label}: the factor of {name} is {factor!r}, must be a number") from None
    if not np.isfinite(shares).all():
        raise InputError(f"{source}#{label}: factors must be finite numbers")
    return shares
