"""Low-rank additions that depend on a preference vector: one model for all weightings of several objectives (PARM; Lin
et al., 2025). Each adapted matrix gets `scale * (A1 W1 B1 + A2 W2(a) B2)`, where W2(a) = sum_i a_i W2_i.

The vector is an input like any other: each row of a batch may have its own.
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pargs_jax.errors import InputError
from pargs_jax.models.layers import Linear

PREFERENCE = "preference"


class BilinearAddition(nnx.Module):
    """The addition of one linear layer, all zero at first. `preference` is `[M]`, or `[B M]` with one for each row."""

    def __init__(
        self, stack: tuple[int, ...], inputs: int, outputs: int, rank: int, objectives: int, scale: float
    ) -> None:
        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros((*stack, *shape)))

        self.shared_in, self.shared_mix, self.shared_out = zeros(inputs, rank), zeros(rank, rank), zeros(rank, outputs)
        self.own_in, self.own_mix, self.own_out = (
            zeros(inputs, rank),
            zeros(objectives, rank, rank),
            zeros(rank, outputs),
        )
        self.preference = nnx.Param(jnp.full((*stack, objectives), 1.0 / objectives))
        self.scale = scale

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        mix = jnp.einsum("...m,mrs->...rs", self.preference[...].astype(x.dtype), self.own_mix[...])
        shared = x @ self.shared_in[...] @ self.shared_mix[...] @ self.shared_out[...]
        return self.scale * (shared + x @ self.own_in[...] @ mix @ self.own_out[...])


@dataclasses.dataclass(frozen=True)
class PreferenceLora:
    """Which linear layers of the blocks are adapted, and how; the numbers are those of PARM's code.

    Attributes:
        objectives: M, the length of preference vectors.
        rank: of both parts of the additions.
        alpha: the additions are scaled by `alpha / rank`.
        layers: a regular expression that a layer's whole name matches.
    """

    objectives: int
    rank: int = 4
    alpha: float = 8.0
    layers: str = "query|key|value"

    def adapt(self, block: nnx.Module) -> None:
        """Gives a block's chosen layers their additions. `block` may be a stack of blocks."""
        linears = {name: part for name, part in vars(block).items() if isinstance(part, Linear)}
        chosen = [part for name, part in linears.items() if re.fullmatch(self.layers, name)]
        if not chosen:
            raise InputError(f"preference additions for {self.layers}: this model has {', '.join(linears)}")
        for linear in chosen:
            *stack, inputs, outputs = linear.kernel.shape
            linear.addition = BilinearAddition(
                tuple(stack), inputs, outputs, self.rank, self.objectives, self.alpha / self.rank
            )


def with_preferences(params: Any, preferences: Float[Array, "B M"]) -> Any:
    """The params of a model with `PreferenceLora`, with a preference vector for each row."""
    if not isinstance(params, dict):
        return params
    return {
        name: jnp.broadcast_to(preferences, (*part.shape[:-1], *preferences.shape))
        if name == PREFERENCE
        else with_preferences(part, preferences)
        for name, part in params.items()
    }


def merge_preference(lora: PreferenceLora, params: Any, preference: Float[Array, "M"]) -> Any:
    """Ordinary params: every addition, for one preference vector, added to its matrix. Computed in fp32."""
    if not isinstance(params, dict):
        return params
    if "addition" not in params:
        return {name: merge_preference(lora, part, preference) for name, part in params.items()}
    rest, own = {name: part for name, part in params.items() if name != "addition"}, params["addition"]
    mix = jnp.einsum("m,...mrs->...rs", preference, own["own_mix"])
    added = own["shared_in"] @ own["shared_mix"] @ own["shared_out"] + own["own_in"] @ mix @ own["own_out"]
    kernel = params["kernel"]
    return rest | {"kernel": (kernel.astype(jnp.float32) + lora.alpha / lora.rank * added).astype(kernel.dtype)}
