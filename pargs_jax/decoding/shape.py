"""What a request asks of the language model's distribution before candidates are chosen: biases, penalties and the
nucleus.

They change which tokens are proposed and the scores, but not the language model's log-probabilities, so that traces and
the KL stay those of the language model itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pargs_jax.decoding.guides.contract import Text
from pargs_jax.decoding.proposals import in_nucleus


class Shape(NamedTuple):
    """The shape of each row's distribution: scores are log p(v) + `added`, for tokens that are `allowed`."""

    top_p: Float[Array, "B"]
    """Only the nucleus of the distribution with what is added, at temperature 1, is allowed; 1 allows all tokens."""
    keeps_rest: Bool[Array, "B"]
    """Whether tokens that are not among the row's candidates can be drawn too, with their scores without rewards."""
    biased: Int[Array, "B M"]
    """Tokens with a bias; a row's unused places hold numbers that are not tokens."""
    bias: Float[Array, "B M"]
    presence: Float[Array, "B"]
    """Subtracted from the scores of tokens that the answer has."""
    frequency: Float[Array, "B"]
    """Subtracted as often as the answer has the token."""

    def added(self, text: Text, vocabulary: int) -> Float[Array, "B V"]:
        """What is added to each token's log-probability after a text."""
        asked = (self.bias != 0).any() | (self.presence != 0).any() | (self.frequency != 0).any()
        nothing = jnp.zeros((len(self.bias), vocabulary))
        return jax.lax.cond(asked, lambda: self._added(text, vocabulary), lambda: nothing)

    def _added(self, text: Text, vocabulary: int) -> Float[Array, "B V"]:
        rows = jnp.arange(len(self.bias))[:, None]
        at = jnp.arange(text.tokens.shape[1])
        is_answer = (at >= text.prompt_lengths[:, None]) & (at < text.lengths[:, None])
        none = jnp.zeros((len(rows), vocabulary))
        counts = none.at[rows, jnp.where(is_answer, text.tokens, vocabulary)].add(1.0, mode="drop")
        penalty = self.presence[:, None] * (counts > 0) + self.frequency[:, None] * counts
        return none.at[rows, self.biased].add(self.bias, mode="drop") - penalty

    def allowed(self, scores: Float[Array, "B V"]) -> Bool[Array, "B V"]:
        """Which tokens may be drawn."""
        # Nuclei take many passes over the vocabulary, and often no row has one.
        has_nucleus = (self.top_p < 1).any()
        return jax.lax.cond(has_nucleus, lambda: in_nucleus(scores, self.top_p), lambda: jnp.ones(scores.shape, bool))
