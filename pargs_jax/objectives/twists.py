"""The loss of twists, the functions that tell sequential Monte Carlo what a prefix promises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.objectives.bradley_terry import Metrics


def contrastive_twist_loss(
    table: Float[Array, "B N R V"],
    log_probs: Float[Array, "B N R V"],
    answers: Int[Array, "B N R"],
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
        table: log psi of the answers' prefixes with each next token, one token before each of the answers' tokens.
        log_probs: log p at the same places.
        answers, lengths: right-padded token ids (end-of-sequence included), and how many are real.
        log_targets: log phi of the whole answers, such as w r(y).
        weights: the weight of each prompt.

    Returns:
        The loss, and means over prompts: `full_loss`, the loss at the last t alone, and `effective_samples`,
        1 / (the sum of squared weights under sigma). If it is near 1, the samples tell little of the target.
    """
    places = jnp.arange(answers.shape[-1])
    is_open = places < lengths[..., None]
    values = jnp.take_along_axis(table, answers[..., None], axis=-1)[..., 0]
    ended = jnp.take_along_axis(values, lengths[..., None] - 1, axis=-1)
    sampled = jnp.where(is_open, values, ended)
    summed = jnp.where(is_open, jax.nn.logsumexp(log_probs + table, axis=-1), ended)
    posterior = jax.nn.softmax(log_targets, axis=1)
    normaliser = jax.nn.logsumexp(summed, axis=1) - jnp.log(answers.shape[1])
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
