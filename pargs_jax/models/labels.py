"""Classifiers with several labels, of which one, or a mix, becomes the reward.

A label is chosen where the model is named: `PATH#helpfulness`, `PATH#0`, or `PATH#helpfulness=0.7,verbosity=-0.3`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from pargs_jax.errors import InputError


def label_names(hf: Any, count: int) -> list[str]:
    """The names of a classifier's labels, by its transformers config (`id2label`). Where the config does not name
    `count` labels, as for a head that was trained later, they have numbers."""
    if hf.num_labels != count:
        return [f"LABEL_{number}" for number in range(count)]
    return [str(hf.id2label[number]) for number in range(count)]


def label_shares(source: str, names: Sequence[str], label: str | None) -> Float[np.ndarray, "labels"]:
    """How much each label of a classifier counts in the reward.

    Args:
        source: names the model in errors.
        names: its labels' names.
        label: a label's name or number; or several, each with its factor. None only if the classifier has one label.

    Raises InputError for a label that it does not have, and for several labels of which none is chosen.
    """
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
