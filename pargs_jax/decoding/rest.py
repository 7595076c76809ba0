"""Treats all tokens that are not candidates as one more candidate, for methods that guide a few tokens and keep all.

If a row draws any of these tokens, it draws the one with the highest sum of scaled log-probability and Gumbel noise.
That token is known before the candidates' rewards are, so it can represent all of them. Its score has their total
probability, and guides score and commit it like any other candidate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


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
    kl_log_prob: Float[Array, "B"]
    noise: Float[Array, "B K+1"]
    """The candidate with the largest `log q + noise` is drawn; same noise as `categorical` over the whole
    vocabulary."""


def draw_rest(
    log_probs: Float[Array, "B V"],
    candidates: Int[Array, "B K"],
    is_candidate: Bool[Array, "B K"],
    temperature: Float[Array, "B"],
    keys: PRNGKeyArray,
) -> Rest:
    """Draws the token that represents the rest of the vocabulary.

    Args:
        log_probs: of all tokens, in nats.
        candidates, is_candidate: the tokens that do not belong to the rest.
        temperature: the sampling temperature; 0 takes the likeliest.
        keys: one per row; the same keys that the row's next token is drawn with.
    """
    rows = jnp.arange(len(log_probs))
    is_greedy = temperature[:, None] == 0
    scale = jnp.where(is_greedy, 1.0, temperature[:, None])
    scaled = log_probs / scale
    noise = jnp.where(is_greedy, 0.0, jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys))
    vocabulary = jnp.where(is_candidate, candidates, log_probs.shape[1])  # empty places exclude nothing
    outside = jnp.ones(log_probs.shape, bool).at[rows[:, None], vocabulary].set(False, mode="drop")
    noisy = jnp.where(outside, scaled + noise, -jnp.inf)
    token = noisy.argmax(axis=1)
    own = scaled[rows, token]
    left = jnp.where(outside, scaled, -jnp.inf)
    exists = outside.any(axis=1)
    total = jnp.where(exists, jnp.where(is_greedy[:, 0], own, jax.nn.logsumexp(left, axis=1)), 0.0)
    mean = (jnp.exp(left - total[:, None]) * jnp.where(outside, log_probs, 0.0)).sum(axis=1)
    of_candidates = jnp.take_along_axis(noise, candidates, axis=1)
    return Rest(
        token,
        exists,
        jnp.where(exists, scale[:, 0] * total, -jnp.inf),
        own - total,
        total - (1.0 / scale[:, 0] - 1.0) * mean,
        jnp.concatenate([of_candidates, (noisy.max(axis=1) - total)[:, None]], axis=1),
    )
