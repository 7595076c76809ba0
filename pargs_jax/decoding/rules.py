"""How a token is drawn from a proposal. A rule returns the distribution that it draws from, so that a step can report
it exactly. A rule that always takes the best candidate gives that candidate all the probability."""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pargs_jax.decoding.proposals import Proposal


class Rule(Protocol):
    """A distribution over the candidates of each row. Static and hashable. `is_random` says whether it gives several
    candidates a probability, so that one of them is drawn."""

    is_random: ClassVar[bool]

    def __call__(self, proposal: Proposal, temperature: Float[Array, "B"]) -> Float[Array, "B K"]:
        """Log-probabilities in nats; minus infinity for candidates that are never drawn."""
        ...


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The candidate with the highest score; ties go to the likelier one."""

    is_random: ClassVar[bool] = False

    def __call__(self, proposal: Proposal, temperature: Float[Array, "B"]) -> Float[Array, "B K"]:
        best = proposal.scores.argmax(axis=-1)
        return jnp.where(jnp.arange(proposal.scores.shape[-1]) == best[:, None], 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Sample:
    """softmax(scores / temperature) over the candidates; a temperature of 0 is greedy."""

    is_random: ClassVar[bool] = True

    def __call__(self, proposal: Proposal, temperature: Float[Array, "B"]) -> Float[Array, "B K"]:
        is_greedy = temperature[:, None] == 0
        scaled = proposal.scores / jnp.where(is_greedy, 1.0, temperature[:, None])
        return jnp.where(is_greedy, Greedy()(proposal, temperature), jax.nn.log_softmax(scaled, axis=-1))


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Contrastive search (Su et al., 2022): the candidate with the highest

        (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

    The rewards are those of one `SimilarityGuide` (minus the largest cosine), and alpha is its weight.
    """

    is_random: ClassVar[bool] = False

    def __call__(self, proposal: Proposal, temperature: Float[Array, "B"]) -> Float[Array, "B K"]:
        alpha = proposal.weights[:, :1]
        scores = (1.0 - alpha) * jnp.exp(proposal.log_probs) + alpha * proposal.rewards[..., 0]
        scores = jnp.where(proposal.is_candidate, scores, -jnp.inf)
        return Greedy()(proposal._replace(scores=scores), temperature)


RULES: dict[str, Rule] = {"greedy": Greedy(), "sample": Sample(), "contrastive": Contrastive()}
