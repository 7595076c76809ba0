"""How a candidate is chosen from fused scores. A rule is a small pytree: temperatures are traced, not compiled in."""

import dataclasses
from typing import Protocol

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Rule(Protocol):
    """Chooses one of K candidates in each row."""

    def __call__(self, scores: Float[Array, "B K"], keys: PRNGKeyArray) -> Int[Array, "B"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The candidate with the highest score; ties go to the likelier one (candidates come sorted)."""

    def __call__(self, scores: Float[Array, "B K"], keys: PRNGKeyArray) -> Int[Array, "B"]:
        return scores.argmax(axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """A draw from softmax(scores / temperature) over the K candidates, with each row's own key."""

    temperature: float | Float[Array, ""] = 1.0

    def __call__(self, scores: Float[Array, "B K"], keys: PRNGKeyArray) -> Int[Array, "B"]:
        return jax.vmap(jax.random.categorical)(keys, scores / self.temperature)
