"""Rotary position embeddings (Su et al., 2021), with every scaling that Llama checkpoints use.

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
}


_OF_EVERY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotation of one checkpoint: its base, and its scaling with the parameters as config.json has them."""

    theta: float = 10000.0
    kind: str = "default"
    numbers: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any]) -> "Rotary":
        """Reads `rope_parameters` of a transformers config. Warns of parameters that the scaling does not use.

        Raises InputError for an unknown or incomplete scaling, and for values that it cannot work with.
        """
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise InputError(f"RoPE scaling {kind!r} is not known; known are {', '.join(SCALINGS)}")
        if parameters.get("partial_rotary_factor") not in (None, 1):
            raise InputError("partial_rotary_factor must be 1 for Llama")
        needs, may_have = SCALINGS[kind]
        rest = {key: value for key, value in parameters.items() if key not in _OF_EVERY_KIND}
        # A factor of null differs from a missing one: YaRN then takes the ratio of the two lengths.
        given = {key for key, value in rest.items() if value is not None or (kind, key) == ("yarn", "factor")}
        if missing := [key for key in needs if key not in given]:
            raise InputError(f"RoPE scaling {kind!r} needs {', '.join(missing)} in rope_parameters")
        if nested := [key for key, value in rest.items() if isinstance(value, Mapping)]:
            raise InputError(f"rope_parameters has {', '.join(nested)}: scaling of single layers is not supported")
        if unused := [key for key, value in rest.items() if key not in (*needs, *may_have) and value is not None]:
            warn(f"config.json: rope_parameters has {', '.join(unused)}, which RoPE scaling {kind!r} does not use")
        numbers = {key: rest[key] for key in (*needs, *may_have) if key in rest}
        if "truncate" in numbers:  # null means no
            numbers["truncate"] = bool(numbers["truncate"])
        numbers = {key: value for key, value in numbers.items() if value is not None or key in needs}
        rotary = cls(parameters.get("rope_theta", 10000.0), kind, tuple(sorted(numbers.items())))
        rotary._check()
        return dataclasses.replace(rotary, theta=float(rotary.theta))

    def _check(self) -> None:
        """Raises InputError for values that give no valid angles."""
        numbers = dict(self.numbers)
        for name, value in {"rope_theta": self.theta, **numbers}.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            may_be_zero = name in SCALINGS[self.kind].may_have
            if not (is_number and (value > 0 or (may_be_zero and value == 0))) and (name, value) != ("factor", None):
                raise InputError(f"{name} is {value!r} in rope_parameters, must be a number above 0")
        if self.kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            raise InputError("high_freq_factor must be greater than low_freq_factor in rope_parameters")
        if self.kind == "yarn" and self.theta == 1:
            raise InputError("rope_theta must not be 1 with RoPE scaling 'yarn'")

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": self.kind, "rope_theta": self.theta, **dict(self.numbers)}

    def reach(self, trained_length: int) -> int:
        """The number of positions that the model supports: dynamic scaling goes beyond the trained context."""
        return int(trained_length * dict(self.numbers)["factor"]) if self.kind == "dynamic" else trained_length

    def cos_sin(
        self, positions: Int[Array, "B T"], head_dim: int, trained_length: int
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """Cosine and sine of every position's angles, fp32.

        Dynamic scaling follows the reference: beyond the trained length, the frequencies depend on the row's longest
        position in this call. This is the only case where a cached step differs from a full pass.
        """
        if self.kind == "dynamic":
            frequencies = self._dynamic_frequencies(positions, head_dim, trained_length)
            amplitude = 1.0
        else:
            static, amplitude = self._static_frequencies(head_dim, trained_length)
            frequencies = jnp.asarray(static, jnp.float32)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude

    def _dynamic_frequencies(self, positions: Array, head_dim: int, trained_length: int) -> Array:
        factor = dict(self.numbers)["factor"]
        length = jnp.maximum(positions.max(-1, keepdims=True) + 1, trained_length).astype(jnp.float32)[..., None]
        base = self.theta * (factor * length / trained_length - (factor - 1)) ** (head_dim / (head_dim - 2))
        return base ** -jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32)

    def _static_frequencies(self, head_dim: int, trained_length: int) -> tuple[np.ndarray, float]:
        frequencies = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        numbers = dict(self.numbers)
        if self.kind == "linear":
            return frequencies / numbers["factor"], 1.0
        if self.kind == "llama3":
            return _llama3(frequencies, numbers), 1.0
        if self.kind == "yarn":
            return _yarn(frequencies, numbers, self.theta, head_dim, trained_length)
        return frequencies, 1.0


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


def rotate(
    x: Float[Array, "B H T D"], cos_sin: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
) -> Float[Array, "B H T D"]:
    """Rotates each head's two halves by the positions' angles; computed in fp32, returned in x's dtype."""
    cos, sin = (part[:, None] for part in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
