"""Losses of values of prefixes on scored answers: what the reward of an answer says of each of its prefixes.

Values come as `[B N]`, the full answer's first, then those of ever shorter prefixes (`choose_prefixes`). Entries beyond
an answer's prefixes have weight 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pargs_jax.data.batches import Batch
from pargs_jax.objectives.bradley_terry import Metrics, choose_prefixes
from pargs_jax.objectives.contract import LossResult, Outputs


def read_values(
    outputs: Outputs, batch: Batch, weighting: Literal["uniform", "linear"] = "uniform"
) -> tuple[Float[Array, "B N"], Float[Array, "B N"]]:
    """The values of all prefixes of a batch's answers, longest first, and their weights: 1, or proportional to length;
    0 for entries that stand for no prefix."""
    prefixes = choose_prefixes(batch.prefix_counts, batch.most_prefixes, weighting=weighting)
    return outputs.rewards_at(prefixes.lengths, descending=True)[..., 0], prefixes.weights


def position_weighted_error(
    values: Float[Array, "B N"], counted: Float[Array, "B N"], rewards: Float[Array, "B"], weights: Float[Array, "B"]
) -> Float[Array, ""]:
    """`sum_t w_t (v_t - r)^2 / sum_t w_t`, the mean over rows by `weights` (RAD, Deng and Raffel, 2023)."""
    errors = jnp.square(values - rewards[:, None])
    per_row = (errors * counted).sum(axis=1) / counted.sum(axis=1)
    return (per_row * weights).sum() / weights.sum()


def mean_over_prefixes(
    losses: Float[Array, "B N"], counted: Float[Array, "B N"], weights: Float[Array, "B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean over all prefixes of a batch, so that an answer counts by its length, and how many these are."""
    counted = counted * weights[:, None]
    return (losses * counted).sum() / counted.sum(), counted.sum()


def label_loss(values: Float[Array, "B N"], labels: Float[Array, "B"]) -> Float[Array, "B N"]:
    """Binary cross-entropy of each prefix's value, a log-odds, with its answer's label from 0 to 1, in nats (FUDGE,
    Yang and Klein, 2021)."""
    return jax.nn.softplus(values) - labels[:, None] * values


def label_accuracy(
    values: Float[Array, "B N"], counted: Float[Array, "B N"], labels: Float[Array, "B"], weights: Float[Array, "B"]
) -> Metrics:
    """`accuracy`: the share of prefixes whose value is on the side of their answer's label, above 1/2 or not."""
    is_right = (values > 0) == (labels > 0.5)[:, None]
    return {"accuracy": mean_over_prefixes(is_right.astype(jnp.float32), counted, weights)[0]}


def td_lambda_returns(values: Float[Array, "B N"], rewards: Float[Array, "B"], decay: float) -> Float[Array, "B N"]:
    """TD(lambda) targets of the prefixes of answers with a reward at the end alone, undiscounted (VAS, Han et al.,
    2024): the full answer's is its reward, and `G_t = (1 - decay) v_(t+1) + decay G_(t+1)`. No gradient flows through
    them."""
    values = jax.lax.stop_gradient(values)

    def shorter(longer: Float[Array, "B"], value: Float[Array, "B"]) -> tuple[Array, Array]:
        target = (1 - decay) * value + decay * longer
        return target, target

    _, rest = jax.lax.scan(shorter, rewards, values[:, :-1].T)
    return jnp.concatenate([rewards[:, None], rest.T], axis=1)


def value_metrics(values: Float[Array, "B N"], rewards: Float[Array, "B"], weights: Float[Array, "B"]) -> Metrics:
    """Means over rows, by these weights: `squared_error` of the full answers' values, `reward_mean` of these, and
    `target_mean`, of the rewards that they should have."""
    full = values[:, 0]
    means = {"squared_error": jnp.square(full - rewards), "reward_mean": full, "target_mean": rewards}
    return {name: (each * weights).sum() / weights.sum() for name, each in means.items()}


def squared_result(
    values: Float[Array, "B N"], targets: Float[Array, "B N"], counted: Float[Array, "B N"], batch: Batch
) -> LossResult:
    """Half the squared distance of values and targets, a mean over all prefixes. The metrics are means over answers,
    which count as they do in the loss, by their prefixes."""
    loss, prefixes = mean_over_prefixes(jnp.square(values - targets) / 2, counted, batch.weights)
    return LossResult(loss, value_metrics(values, batch.rewards[:, 0], counted.sum(axis=1) * batch.weights), prefixes)
