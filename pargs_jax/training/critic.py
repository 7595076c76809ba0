"""The critic of PPO: a linear layer from the policy's hidden states to one number. It is trained beside the policy, and
not exported with it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pargs_jax.models.model import Params
from pargs_jax.sharding import name_dimensions, place_computed

CRITIC = "critic"
"""Its name among the trained parameters."""

name_dimensions(f"{CRITIC}.kernel", ("width", None))
name_dimensions(f"{CRITIC}.bias", (None,))


def new_critic(width: int) -> Params:
    """A critic whose values are all 0, under its name."""
    return place_computed(lambda _: {CRITIC: {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}}, 0)


def values_of(critic: Params, states: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """The values (fp32) of the texts that end at these hidden states."""
    return (jnp.matmul(states.astype(jnp.float32), critic["kernel"], precision="highest") + critic["bias"])[..., 0]
