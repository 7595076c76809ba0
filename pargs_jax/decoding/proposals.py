"""Which tokens are candidates, and what a step knows of them. A proposer is a small static object."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Proposal(NamedTuple):
    """The candidates of a step with all that a rule may look at; candidates come with the likeliest first."""

    tokens: Int[Array, "B K"]
    is_candidate: Bool[Array, "B K"]
    """A row may have fewer than K."""
    log_probs: Float[Array, "B K"]
    """Under the language model: over its whole vocabulary, at temperature 1, in nats."""
    rewards: Float[Array, "B K J"]
    scores: Float[Array, "B K"]
    """`log p + sum_j w_j r_j`; minus infinity where there is no candidate."""
    hidden: Float[Array, "B D"]
    """The language model's final hidden state, before the candidates."""


class Proposer(Protocol):
    """Chooses the candidates of each row."""

    def size(self, vocab_size: int) -> int:
        """K, the most candidates of a row."""
        ...

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        """The candidates, and which of the K places hold one.

        Args:
            logits: the language model's.
            vocabulary_rewards: the weighted sum of the vocabulary guides' rewards, zero without any.
            counts: how many candidates each row asks for, at most K.
        """
        ...


@dataclasses.dataclass(frozen=True)
class TopK:
    """The language model's k likeliest tokens; a row may ask for fewer."""

    k: int

    def size(self, vocab_size: int) -> int:
        return self.k

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        return jax.lax.top_k(logits, self.k)[1], jnp.arange(self.k) < counts[:, None]


@dataclasses.dataclass(frozen=True)
class AllTokens:
    """The whole vocabulary, in the order of its ids; for vocabulary guides, since a candidate guide would have to score
    every token."""

    def size(self, vocab_size: int) -> int:
        return vocab_size

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        tokens = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
        return tokens, jnp.ones(logits.shape, bool)
