"""The tokens that are not candidates, as one more candidate, for methods that guide a few tokens and keep all.

If a row draws any of those tokens, it draws the one with the highest sum of scaled log-probability and Gumbel noise.
That one is known before the candidates' rewards are. So it stands for all of them: its score has their whole
probability, and guides score it and keep it like any other candidate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Rest(NamedTuple):
    """The tokens that are not among the candidates, and the one that stands for them.

    `log_share` and `kl_log_prob` are the same for all that may be drawn: KL(q || p) is a sum over candidates of
    q (log q - log p), in which the rest, with its own q, has `kl_log_prob` for log p.
    """

    token: Int[Array, "B"]
    """The one that stands for them."""
    exists: Bool[Array, "B"]
    """Whether there is any."""
    score: Float[Array, "B"]
    """temperature * log sum exp(log p / temperature), so that a softmax gives them the probability that they have."""
    log_share: Float[Array, "B"]
    """Log-probability of the token among them, at the row's temperature."""
    kl_log_prob: Float[Array, "B"]
    noise: Float[Array, "B K+1"]
    """What `log q + noise` is the largest of is drawn, by the same noise as `categorical` over the whole vocabulary."""


def draw_rest(
    log_probs: Float[Array, "B V"],
    candidates: Int[Array, "B K"],
    is_candidate: Bool[Array, "B K"],
    temperature: Float[Array, "B"],
    keys: PRNGKeyArray,
) -> Rest:
    """Draws the token that stands for the rest of the vocabulary.

    Args:
        log_probs: of all tokens, in nats.
        candidates, is_candidate: what is left out.
        temperature: that of the sampling; 0 takes the likeliest.
        keys: one a row, those that the row's next token is drawn with.
    """
    rows = jnp.arange(len(log_probs))
    is_greedy = temperature[:, None] == 0
    scale = jnp.where(is_greedy, 1.0, temperature[:, None])
    scaled = log_probs / scale
    noise = jnp.where(is_greedy, 0.0, jax.vmap(lambda key: jax.random.gumbel(key, log_probs.shape[1:]))(keys))
    vocabulary = jnp.where(is_candidate, candidates, log_probs.shape[1])  # other places mark nothing
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
