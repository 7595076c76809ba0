"""Choosing candidates, and the data about them that a step passes on. A proposer is a small static object."""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.errors import InputError


class Proposal(NamedTuple):
    """The candidates of a step, the likeliest first, with all data that a rule may use."""

    tokens: Int[Array, "B K"]
    is_candidate: Bool[Array, "B K"]
    """Which of the K places hold a candidate; a row may have fewer than K."""
    log_probs: Float[Array, "B K"]
    """Log-probabilities under the language model, over its whole vocabulary, at temperature 1, in nats."""
    rewards: Float[Array, "B K J"]
    scores: Float[Array, "B K"]
    """`log p + sum_j w_j r_j`, with rewards in the decoder's `RewardForm`; minus infinity in places without a
    candidate."""
    hidden: Float[Array, "B D"]
    """The language model's final hidden state, before any candidate."""
    weights: Float[Array, "B J"]
    """Each guide's weight in this step; all 0 where the row is not guided."""


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
            vocabulary_rewards: the weighted sum of the vocabulary guides' rewards; zero without such guides.
            counts: the number of candidates that each row asks for, at most K.
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
class TopKOfSum(TopK):
    """The k highest sums of log-probability and vocabulary rewards (FaRMA; Rashid et al., 2025). Candidate guides score
    only tokens that are already proposed, so with candidate guides alone this equals `TopK`."""

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        return super().__call__(logits + vocabulary_rewards, vocabulary_rewards, counts)


@dataclasses.dataclass(frozen=True)
class AllTokens:
    """The whole vocabulary, in the order of its ids. Meant for vocabulary guides: a candidate guide would have to score
    every token."""

    def size(self, vocab_size: int) -> int:
        return vocab_size

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        tokens = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
        return tokens, jnp.ones(logits.shape, bool)


@dataclasses.dataclass(frozen=True)
class TopP(AllTokens):
    """The nucleus: the fewest tokens, likeliest first, with a total probability of at least `mass` under the language
    model at temperature 1 (Holtzman et al., 2020). Tokens as likely as the last of them are included too.

    Candidates are in the order of their ids.
    """

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise InputError(f"top_p: got {self.mass}, must be above 0 and at most 1")

    def __call__(
        self, logits: Float[Array, "B V"], vocabulary_rewards: Float[Array, "B V"], counts: Int[Array, "B"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        tokens, every = super().__call__(logits, vocabulary_rewards, counts)
        if self.mass == 1:  # rounded sums may reach 1 too early
            return tokens, every
        return tokens, in_nucleus(logits, jnp.float32(self.mass))


def in_nucleus(logits: Float[Array, "B V"], mass: Float[Array, "..."]) -> Bool[Array, "B V"]:
    """The fewest tokens, likeliest first, with a total probability of at least `mass`, one number or one for each row.
    Tokens as likely as the last of them are included too; a mass of 1 or more includes all."""
    # The least probability in the nucleus, by bisection over its bits, which order positive floats correctly. 30 passes
    # over the vocabulary are much faster than a sort.
    probs = jax.nn.softmax(logits, axis=-1)
    mass = jnp.broadcast_to(mass, len(probs))[:, None]

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        larger = probs > jax.lax.bitcast_convert_type(middle, jnp.float32)
        is_enough = jnp.where(larger, probs, 0.0).sum(axis=-1, keepdims=True) >= mass
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    one = jnp.full((len(probs), 1), jnp.float32(1.0)).view(jnp.int32)
    _, least = jax.lax.fori_loop(0, 30, halve, (jnp.full_like(one, -1), one))
    return (probs >= jax.lax.bitcast_convert_type(least, jnp.float32)) | (mass >= 1)


RewardForm = Literal["plain", "clipped", "centred"]
"""How rewards enter the scores: unchanged; clipped to [0, 1] (RAD); or minus their mean over the candidates (VAS)."""


def in_form(
    form: RewardForm, rewards: Float[Array, "B K J"], is_candidate: Bool[Array, "B K"]
) -> Float[Array, "B K J"]:
    """Converts candidates' rewards to this form."""
    if form == "clipped":
        return jnp.clip(rewards, 0.0, 1.0)
    if form == "centred":
        real = is_candidate[..., None]
        return rewards - jnp.mean(rewards, axis=1, keepdims=True, where=real)
    return rewards
