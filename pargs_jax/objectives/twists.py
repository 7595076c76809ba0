"""The loss of twists, the functions that tell sequential Monte Carlo what a prefix promises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.objectives.backups import token_values
from pargs_jax.objectives.bradley_terry import Metrics


def twists_of(
    table: Float[Array, "*B V"], tokens: Int[Array, "*B"], logits: Float[Array, "*B V"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """`log psi` of each sample's next token, and `log E_p psi`, the sum over all next tokens.

    Args:
        table: log psi of a prefix with each next token.
        tokens: the samples' next tokens.
        logits: of p, for the next token.
    """
    summed = jax.nn.logsumexp(jax.nn.log_softmax(logits) + table, axis=-1)
    return token_values(table, tokens), summed


def contrastive_twist_loss(
    values: Float[Array, "B N R"],
    summed: Float[Array, "B N R"],
    lengths: Int[Array, "B N"],
    log_targets: Float[Array, "B N"],
    weights: Float[Array, "B"],
) -> tuple[Float[Array, ""], Metrics]:
    """`log E_p psi_t(y_1..t) - E_sigma log psi_t(y_1..t)`, a mean over t up to the longest of a prompt's samples, then
    over prompts. Its gradient is that of contrastive twist learning, `E_pi grad log psi_t - E_sigma grad log psi_t`
    with pi_t = p psi_t / Z_t (Zhao et al., 2024, arXiv 2404.17546), and it is least where p psi_t is the marginal of
    the target sigma = p phi / Z. A constant added to all of a prompt's log psi_t makes no difference.

    Both expectations are over a prompt's N samples of p. Under sigma they have the weights softmax(log phi). Under p
    they weigh the same, and their t-th token is not the sampled one: it is summed over the vocabulary exactly, so that
    tokens without a sample learn, too. A sample that has ended stays as it is.

    Args:
        values, summed: `twists_of` the answers' tokens.
        lengths: tokens of each answer (end-of-sequence included).
        log_targets: log phi of the whole answers, such as w r(y).
        weights: the weight of each prompt.

    Returns:
        The loss, and means over prompts: `full_loss`, the loss at the last t alone, and `effective_samples`,
        1 / (the sum of squared weights under sigma). If it is near 1, the samples tell little of the target.
    """
    places = jnp.arange(values.shape[-1])
    is_open = places < lengths[..., None]
    ended = jnp.take_along_axis(values, lengths[..., None] - 1, axis=-1)
    sampled = jnp.where(is_open, values, ended)
    summed = jnp.where(is_open, summed, ended)
    posterior = jax.nn.softmax(log_targets, axis=1)
    normaliser = jax.nn.logsumexp(summed, axis=1) - jnp.log(values.shape[1])
    losses = normaliser - (posterior[..., None] * sampled).sum(axis=1)
    longest = lengths.max(axis=1)
    per_prompt = jnp.where(places < longest[:, None], losses, 0.0).sum(axis=1) / longest
    metrics = {
        "full_loss": jnp.take_along_axis(losses, longest[:, None] - 1, axis=1)[:, 0],
        "effective_samples": 1 / jnp.square(posterior).sum(axis=1),
    }

    def mean(x: Float[Array, "B"]) -> Float[Array, ""]:
        return (x * weights).sum() / weights.sum()

    return mean(per_prompt), {name: mean(x) for name, x in metrics.items()}
