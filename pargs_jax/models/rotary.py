"""Rotary position embeddings (Su et al., 2021), with every scaling that transformers has for language models.

The layout is that of Hugging Face checkpoints: the two halves of a head are rotated against each other.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pargs_jax.errors import InputError, warn


class Scaling(NamedTuple):
    """The parameters of one scaling in config.json, besides `rope_type` and `rope_theta`: required and optional
    ones."""

    needs: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()


SCALINGS: dict[str, Scaling] = {
    "default": Scaling(),
    "linear": Scaling(("factor",)),
    "dynamic": Scaling(("factor",)),
    "llama3": Scaling(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": Scaling(
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": Scaling(
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")
    ),
    "proportional": Scaling(may_have=("factor",)),
}


BY_LENGTH = ("dynamic", "longrope")
"""Scalings whose angles depend on the length of the text."""

_OF_EVERY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
_KNOWN = {name for scaling in SCALINGS.values() for part in scaling for name in part}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotation of one checkpoint: its base, and its scaling with the parameters as config.json has them. `share` is
    the part of each head that is rotated."""

    theta: float = 10000.0
    kind: str = "default"
    numbers: tuple[tuple[str, Any], ...] = ()
    share: float = 1.0

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], head_dim: int, *, may_be_partial: bool = False) -> "Rotary":
        """Reads `rope_parameters` of a transformers config. Warns of parameters of other scalings, and of scalings that
        a cache cannot follow beyond some length.

        Raises InputError for an unknown or incomplete scaling, for parameters that no scaling has, for values that it
        cannot work with, and for a width of heads that it cannot rotate. `may_be_partial` says that the architecture
        can rotate a part of each head.
        """
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise InputError(f"RoPE scaling {kind!r} is not known; known are {', '.join(SCALINGS)}")
        share = parameters.get("partial_rotary_factor")
        share = 1.0 if share is None else share
        if share != 1 and not may_be_partial and kind != "proportional":
            raise InputError(f"partial_rotary_factor is {share!r}, must be 1 for this architecture")
        needs, may_have = SCALINGS[kind]
        rest = {key: value for key, value in parameters.items() if key not in _OF_EVERY_KIND}
        # A factor of null differs from a missing one: YaRN then takes the ratio of the two lengths.
        given = {key for key, value in rest.items() if value is not None or (kind, key) == ("yarn", "factor")}
        if missing := [key for key in needs if key not in given]:
            raise InputError(f"RoPE scaling {kind!r} needs {', '.join(missing)} in rope_parameters")
        if nested := [key for key, value in rest.items() if isinstance(value, Mapping)]:
            raise InputError(f"rope_parameters has {', '.join(nested)}: scaling of single layers is not supported")
        if unknown := [key for key, value in rest.items() if key not in _KNOWN and value is not None]:
            raise InputError(f"rope_parameters has {', '.join(unknown)}, which no known scaling uses")
        if unused := [key for key, value in rest.items() if key not in (*needs, *may_have) and value is not None]:
            warn(f"config.json: rope_parameters has {', '.join(unused)}, which RoPE scaling {kind!r} does not use")
        numbers = {key: rest[key] for key in (*needs, *may_have) if key in rest}
        if "truncate" in numbers:  # null means no
            numbers["truncate"] = bool(numbers["truncate"])
        numbers = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in numbers.items()
            if value is not None or key in needs
        }
        rotary = cls(parameters.get("rope_theta", 10000.0), kind, tuple(sorted(numbers.items())), share)
        rotary._check(head_dim)
        if kind in BY_LENGTH:
            warn(
                f"config.json: RoPE scaling {kind!r} rotates all tokens anew once a text is longer than the model was "
                "first trained on; a cache cannot, so answers that cross this length while they grow are not exact"
            )
        return dataclasses.replace(rotary, theta=float(rotary.theta), share=float(rotary.share))

    def _check(self, head_dim: int) -> None:
        """Raises InputError for values that give no valid angles."""
        numbers = dict(self.numbers)
        if not (_is_number(self.share) and 0 < self.share <= 1):
            raise InputError(f"partial_rotary_factor is {self.share!r}, must be a number above 0 and at most 1")
        turned = self._rotated(head_dim)
        if turned < 2 or turned % 2 or (turned == 2 and self.kind == "dynamic"):
            part = "" if turned == head_dim else f" with partial_rotary_factor {self.share}"
            raise InputError(f"head_dim is {head_dim}{part}, which rotary positions ({self.kind}) cannot rotate")
        for name in ("short_factor", "long_factor") if self.kind == "longrope" else ():
            factors = numbers.pop(name)
            is_list = isinstance(factors, tuple) and len(factors) == turned // 2
            if not (is_list and all(_is_number(factor) and factor > 0 for factor in factors)):
                raise InputError(f"{name} must be a list of {turned // 2} numbers above 0 in rope_parameters")
        for name, value in {"rope_theta": self.theta, **numbers}.items():
            may_be_zero = name in SCALINGS[self.kind].may_have and name != "factor"
            is_valid = _is_number(value) and (value > 0 or (may_be_zero and value == 0))
            if not is_valid and (name, value) != ("factor", None):
                raise InputError(f"{name} is {value!r} in rope_parameters, must be a number above 0")
        if self.kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            raise InputError("high_freq_factor must be greater than low_freq_factor in rope_parameters")
        if self.kind == "yarn" and self.theta == 1:
            raise InputError("rope_theta must not be 1 with RoPE scaling 'yarn'")
        if self.kind == "longrope" and numbers["original_max_position_embeddings"] <= 1:
            raise InputError("original_max_position_embeddings must be greater than 1 with RoPE scaling 'longrope'")

    def to_hf(self) -> dict[str, Any]:
        numbers = {key: list(value) if isinstance(value, tuple) else value for key, value in self.numbers}
        share = {} if self.share == 1 else {"partial_rotary_factor": self.share}
        return {"rope_type": self.kind, "rope_theta": self.theta, **share, **numbers}

    def _rotated(self, head_dim: int) -> int:
        """How many dimensions of a head are rotated; with proportional scaling all, some of them by nothing."""
        return head_dim if self.kind == "proportional" else int(head_dim * self.share)

    def reach(self, trained_length: int) -> int:
        """The number of positions that the model supports: dynamic scaling goes beyond the trained context."""
        return int(trained_length * dict(self.numbers)["factor"]) if self.kind == "dynamic" else trained_length

    def same_up_to(self, trained_length: int) -> int | None:
        """The most tokens of a text whose angles do not depend on its length; None if no text's do."""
        if self.kind == "longrope":
            return int(dict(self.numbers)["original_max_position_embeddings"])
        return trained_length if self.kind == "dynamic" else None

    def cos_sin(
        self, positions: Int[Array, "B T"], head_dim: int, trained_length: int
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosine and sine of every position's angles, fp32; half as many as the dimensions of a head that are rotated.

        Dynamic scaling and LongRoPE follow the reference: the frequencies depend on the row's longest position in this
        call. A cached step therefore differs from a full pass beyond the trained length (dynamic), or once a text has
        grown beyond `original_max_position_embeddings` (LongRoPE). All other scalings are the same in both.
        """
        rotated, numbers = self._rotated(head_dim), dict(self.numbers)
        exponents = np.arange(0, rotated, 2) / rotated
        frequencies: Any = self.theta**-exponents
        amplitude = 1.0
        if self.kind == "linear":
            frequencies = frequencies / numbers["factor"]
        elif self.kind == "proportional":
            frequencies = np.where(np.arange(rotated // 2) < int(self.share * head_dim // 2), frequencies, 0.0)
            frequencies = frequencies / numbers.get("factor", 1.0)
        elif self.kind == "llama3":
            frequencies = _llama3(frequencies, numbers)
        elif self.kind == "yarn":
            frequencies, amplitude = _yarn(frequencies, numbers, self.theta, rotated, trained_length)
        elif self.kind == "dynamic":
            length = jnp.maximum(_lengths(positions), trained_length).astype(jnp.float32)
            stretch = numbers["factor"] * length / trained_length - (numbers["factor"] - 1)
            base = self.theta * stretch ** (rotated / (rotated - 2))
            frequencies = base ** -jnp.asarray(exponents, jnp.float32)
        elif self.kind == "longrope":
            short, long = (frequencies / np.asarray(numbers[name]) for name in ("short_factor", "long_factor"))
            is_long = _lengths(positions) > numbers["original_max_position_embeddings"]
            frequencies, amplitude = jnp.where(is_long, long, short), _longrope_amplitude(numbers, trained_length)
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _lengths(positions: Int[Array, "B T"]) -> Int[Array, "B 1 1"]:
    """The length of each row's text, up to its longest position."""
    return positions.max(-1)[:, None, None] + 1


def _llama3(frequencies: np.ndarray, numbers: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, and those between interpolated."""
    turns = numbers["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / numbers["factor"])


def _yarn(
    frequencies: np.ndarray, numbers: Mapping[str, Any], theta: float, head_dim: int, trained_length: int
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): interpolation by the number of turns, and a larger amplitude."""
    first_length = numbers["original_max_position_embeddings"]
    factor = trained_length / first_length if numbers["factor"] is None else numbers["factor"]

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(first_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(numbers.get("beta_fast") or 32), dimension_of(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return frequencies * ((1 - ramp) + ramp / factor), _yarn_amplitude(factor, numbers)


def _yarn_amplitude(factor: float, numbers: Mapping[str, Any]) -> float:
    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in numbers:
        return float(numbers["attention_factor"])
    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return amplitude(numbers["mscale"]) / amplitude(numbers["mscale_all_dim"])
    return amplitude(1.0)


def _longrope_amplitude(numbers: Mapping[str, Any], trained_length: int) -> float:
    """LongRoPE (Ding et al., 2024): a larger amplitude for longer contexts."""
    if "attention_factor" in numbers:
        return float(numbers["attention_factor"])
    first_length = numbers["original_max_position_embeddings"]
    factor = numbers.get("factor", trained_length / first_length)
    return math.sqrt(1 + math.log(factor) / math.log(first_length)) if factor > 1 else 1.0


def rotate(
    x: Float[Array, "B H T D"], cos_sin: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
) -> Float[Array, "B H T D"]:
    """Rotates two halves of each head by the positions' angles; computed in fp32, returned in x's dtype. With fewer
    angles than that, they are the halves of the head's first dimensions; the others stay as they are."""
    cos, sin = (part[:, None] for part in cos_sin)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
