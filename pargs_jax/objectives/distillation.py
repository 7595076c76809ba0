"""The loss of a table of rewards that learns from a scalar reward model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pargs_jax.objectives.contract import LossResult
from pargs_jax.objectives.prefix_values import mean_over_prefixes


def rewards_of_likeliest(
    k: int, table: Float[Array, "*B V"], tokens: Int[Array, "*B"], logits: Float[Array, "*B V"]
) -> tuple[Int[Array, "*B K"], Float[Array, "*B K"]]:
    """The k next tokens that are likeliest by these logits, and their rewards in a table."""
    candidates = jax.lax.top_k(logits, k)[1]
    return candidates, jnp.take_along_axis(table, candidates, axis=-1)


def distillation_loss(
    rewards: Float[Array, "B R K"],
    targets: Float[Array, "B R K"],
    lengths: Int[Array, "B"],
    weights: Float[Array, "B"],
) -> LossResult:
    """Half the squared distance of rewards and targets, a mean over candidates and over all places of a batch. No
    gradient flows through the targets. (Low-rank RAD, arXiv 2407.04615, distils a reward model into such a table, too.)

    Args:
        rewards, targets: of K candidates at each place of the answers.
        lengths: tokens of each answer.
        weights: the weight of each answer.

    Returns:
        The loss. Its metrics are means over places: `squared_error`; `reward_mean` and `target_mean`; `target_spread`,
        the standard deviation of a place's targets; and, with several candidates, `accuracy`: the share of places where
        the candidate with the highest reward also has the highest target.
    """
    targets = jax.lax.stop_gradient(targets)
    counted = jnp.arange(rewards.shape[1]) < lengths[:, None]
    errors = jnp.square(rewards - targets).mean(axis=-1)
    per_place = {
        "squared_error": errors,
        "reward_mean": rewards.mean(axis=-1),
        "target_mean": targets.mean(axis=-1),
        "target_spread": targets.std(axis=-1),
    }
    if rewards.shape[-1] > 1:
        per_place["accuracy"] = (rewards.argmax(axis=-1) == targets.argmax(axis=-1)).astype(jnp.float32)
    metrics = {name: mean_over_prefixes(values, counted, weights)[0] for name, values in per_place.items()}
    return LossResult(metrics["squared_error"] / 2, metrics, (lengths * weights).sum())
