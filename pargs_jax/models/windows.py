"""Sliding windows: layers in which a token sees only the last few positions, its own included.

A window is a condition on two positions. It narrows what a token sees in any case: in a whole text, in a cache, or
beside other candidates.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pargs_jax.errors import InputError
from pargs_jax.models.layers import BesideCache, InCache, Sight

Windows = tuple[int | None, ...]
"""The window of every layer, None for a layer that sees everything; empty if no layer has one."""

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of_layers(hf: Any) -> Windows:
    """Reads `layer_types` and `sliding_window` of a transformers config.

    Raises InputError for a kind of layer that is not known, and for sliding layers without a window.
    """
    kinds = hf.layer_types
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        raise InputError(f"layer_types has {', '.join(unknown)}, must be {FULL} or {SLIDING}")
    if SLIDING not in kinds:
        return ()
    if hf.sliding_window is None:
        raise InputError(f"layer_types has {SLIDING}, but sliding_window is not set")
    return tuple(hf.sliding_window if kind == SLIDING else None for kind in kinds)


def fields_of_windows(windows: Windows, layers: int) -> dict[str, Any]:
    """The reverse of `windows_of_layers`."""
    if not windows:  # transformers makes a mask for sliding layers even where there are none, so its default stays
        return {"layer_types": [FULL] * layers}
    kinds = [FULL if window is None else SLIDING for window in windows]
    return {"layer_types": kinds, "sliding_window": next(filter(None, windows))}


def sights_of_layers(
    sight: Sight, positions: Int[Array, "B T"], windows: Windows
) -> Callable[[int | Int[Array, ""]], Sight]:
    """A function from a layer's number to what its new tokens see. `sight` is what they would see without windows."""
    if len(set(windows)) <= 1:
        same = within(sight, positions, windows[0] if windows else None)
        return lambda _: same
    everything = np.iinfo(np.int32).max
    numbers = jnp.asarray([everything if window is None else window for window in windows])
    return lambda index: within(sight, positions, windows[index] if isinstance(index, int) else numbers[index])


def within(sight: Sight, positions: Int[Array, "B T"], window: int | Int[Array, ""] | None) -> Sight:
    """What new tokens at these positions see of `sight` through a window. None means everything."""
    if window is None:
        return sight

    def near(keys: Int[Array, "*B S"]) -> Bool[Array, "B T S"]:
        return positions[..., None] - keys[..., None, :] < window

    if isinstance(sight, InCache):
        return sight._replace(mask=sight.mask & near(jnp.arange(sight.mask.shape[-1])))
    if isinstance(sight, BesideCache):
        valid = sight.valid if sight.valid.ndim == 3 else sight.valid[:, None]
        cached = jnp.arange(valid.shape[-1]) if sight.positions is None else sight.positions
        return sight._replace(valid=valid & near(cached), mask=sight.mask & near(positions))
    return sight & near(positions)
