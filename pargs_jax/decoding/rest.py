"""Treats all tokens that are not candidates as one more candidate, for methods that guide a few tokens and keep all.

If a row draws any of these tokens, it draws the one with the highest sum of scaled log-probability and Gumbel noise.
That token is known before the candidates' rewards are, so it can represent all of them. Its score has their total
probability, and guides score and commit it like any other candidate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Rest(NamedTuple):
    """The tokens that are not candidates, and the one that represents them.

    All these tokens share `log_share` and `kl_log_prob`. KL(q || p) is a sum over candidates of q (log q - log p); the
    term of the rest uses its q, and `kl_log_prob` as log p.
    """

    token: Int[Array, "B"]
    """The token that represents them."""
    exists: Bool[Array, "B"]
    """Whether there are any such tokens."""
    score: Float[Array, "B"]
    """temperature * log sum exp(log p / temperature), so that a softmax gives them their total probability."""
    log_share: Float[Array, "B"]
    """Log-probability of `token` among these tokens, at the row's temperature."""
    scaled: Float[Array, "B V"]
    """Log-probability of each token of the vocabulary among these tokens, at the row's temperature; minus infinity for
    other tokens."""
    log_mass: Float[Array, "B"]
    """log sum exp of these tokens' scores, at temperature 1."""
    own_score: Float[Array, "B"]
    """The score of `token` alone, at temperature 1."""
    kl_log_prob: Float[Array, "B"]
    noise: Float[Array, "B"]
    """Its noise: the candidate with the largest `log q + noise` is drawn."""


def draw_rest(
    log_probs: Float[Array, "B V"],
    scores: Float[Array, "B V"],
    outside: Bool[Array, "B V"],
    temperature: Float[Array, "B"],
    noise: Float[Array, "B V"],
) -> Rest:
    """Draws the token that represents the rest of the vocabulary.

    Args:
        log_probs: of all tokens, in nats, under the language model.
        scores: of all tokens, before rewards: the log-probabilities, or these with a row's own shape (`Shape`).
        outside: the tokens that belong to the rest.
        temperature: the sampling temperature; 0 takes the likeliest.
        noise: Gumbel noise of each token, that the row's next token is drawn with.
    """
    rows = jnp.arange(len(scores))
    is_greedy = temperature[:, None] == 0
    scale = jnp.where(is_greedy, 1.0, temperature[:, None])
    scaled = scores / scale
    noisy = jnp.where(outside, scaled + jnp.where(is_greedy, 0.0, noise), -jnp.inf)
    token = noisy.argmax(axis=1)
    own = scaled[rows, token]
    left = jnp.where(outside, scaled, -jnp.inf)
    exists = outside.any(axis=1)
    total = jnp.where(exists, jnp.where(is_greedy[:, 0], own, jax.nn.logsumexp(left, axis=1)), 0.0)
    is_token = jnp.arange(scores.shape[1]) == token[:, None]
    shares = jnp.where(is_greedy, is_token, jnp.exp(left - total[:, None]))
    return Rest(
        token,
        exists,
        jnp.where(exists, scale[:, 0] * total, -jnp.inf),
        own - total,
        left - total[:, None],
        jax.nn.logsumexp(jnp.where(outside, scores, -jnp.inf), axis=1),
        scores[rows, token],
        total - (shares * jnp.where(outside, scaled - log_probs, 0.0)).sum(axis=1),
        noisy.max(axis=1) - total,
    )
