"""Bradley-Terry losses on pairs of answers: on the full answers, and on all their prefixes (PARGS).

Rewards come as `[B 2 R]`, chosen first: entry i-1 is the reward of the answer's first i tokens. An answer of length n
has n prefixes; past its end it stays at its last, as the paper's padding means.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Metrics = dict[str, Array]
FRACTIONS = (10, 25, 50, 75, 100)
"""Percentages of the longer answer at which accuracy is reported."""


def bradley_terry(
    rewards: Float[Array, "B 2 R"],
    lengths: Int[Array, "B 2"],
    weights: Float[Array, "B"] | None = None,
    *,
    margin: float = 0.0,
    centring: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss on full answers: `-log sigmoid(r(y_w) - r(y_l))` (PARGS, Eq. 1), in nats a pair.

    Args:
        rewards: reward of every prefix of the chosen and the rejected answers, fp32.
        lengths: tokens of each answer, at least 1.
        weights: how much each pair counts; 0 leaves it out. Default: all 1.
        margin: subtracted from the difference (Touvron et al., 2023, Eq. 2, with one margin for all).
        centring: weight of `(r(y_w) + r(y_l))^2`, which keeps rewards around zero (Eisenstein et al., 2023).

    Returns:
        The weighted mean over pairs, and `preference_metrics`.
    """
    weights = jnp.ones(rewards.shape[0]) if weights is None else weights
    losses = _pair_loss(prefix_rewards(rewards, lengths, lengths.max(axis=1)), margin, centring)
    return _mean(losses, weights), preference_metrics(rewards, lengths, weights)


def partial_bradley_terry(
    rewards: Float[Array, "B 2 R"],
    lengths: Int[Array, "B 2"],
    weights: Float[Array, "B"] | None = None,
    *,
    prefix_weights: Literal["uniform", "linear"] = "uniform",
    stride: int = 1,
    sample: int | None = None,
    minimum_length: int = 1,
    margin: float = 0.0,
    centring: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss on all prefixes: for i = 1 .. max(|y_w|, |y_l|), `-log sigmoid(r(y_w[:i]) - r(y_l[:i]))` (PARGS, Eq. 5).

    The mean is over a pair's prefixes first, then over pairs, so a long pair counts as much as a short one. A causal
    model gives all rewards in one pass, so the loss costs what the full-answer one does; it is mapped over prefix
    lengths by `vmap`.

    Args:
        rewards, lengths, weights, margin, centring: as in `bradley_terry`.
        prefix_weights: `uniform`, or `linear`: proportional to i (Deng and Raffel, 2023).
        stride: take every n-th prefix, counted back from the full pair, which is always taken.
        sample: take this many of a pair's prefixes, at random, by `key`; all of them if there are no more.
        minimum_length: leave out prefixes shorter than this, but never the full pair.
        key: randomness for `sample`; required with it.
    """
    weights = jnp.ones(rewards.shape[0]) if weights is None else weights
    longest = lengths.max(axis=1)
    prefixes = jnp.arange(1, rewards.shape[-1] + 1)

    def losses_at(prefix: Int[Array, ""]) -> Float[Array, "B"]:
        return _pair_loss(prefix_rewards(rewards, lengths, prefix), margin, centring)

    losses = jax.vmap(losses_at, out_axes=1)(prefixes)
    taken = _taken_prefixes(prefixes, longest, stride, minimum_length)
    if sample is not None:
        if key is None:
            raise ValueError("sample needs a key")
        taken = _sample_prefixes(taken, sample, key)
    share = taken * (prefixes if prefix_weights == "linear" else jnp.ones_like(prefixes))
    per_pair = (losses * share).sum(axis=1) / share.sum(axis=1)
    return _mean(per_pair, weights), preference_metrics(rewards, lengths, weights)


def prefix_rewards(
    rewards: Float[Array, "B 2 R"], lengths: Int[Array, "B 2"], prefix: Int[Array, "*B"]
) -> Float[Array, "B 2"]:
    """Rewards of the first `prefix` tokens of each answer, or of the whole answer where that is shorter."""
    last = jnp.minimum(jnp.broadcast_to(prefix, lengths.shape[:1])[:, None], lengths) - 1
    return jnp.take_along_axis(rewards, last[..., None], axis=-1)[..., 0]


def preference_metrics(
    rewards: Float[Array, "B 2 R"], lengths: Int[Array, "B 2"], weights: Float[Array, "B"]
) -> Metrics:
    """What is logged of a batch, all fp32 scalars.

    `accuracy` (share of pairs whose chosen answer has the higher reward, a tie counting half), `accuracy_10` ..
    `accuracy_100` (the same at that percentage of the longer answer, rounded up; answers that still agree tie),
    `margin` (mean reward difference), and over all full answers `reward_mean`, `reward_min`, `reward_max`.
    """
    longest = lengths.max(axis=1)
    metrics: Metrics = {}
    for percent in FRACTIONS:
        pair = prefix_rewards(rewards, lengths, (longest * percent + 99) // 100)
        metrics[f"accuracy_{percent}"] = _mean(0.5 + 0.5 * jnp.sign(pair[:, 0] - pair[:, 1]), weights)
    full = prefix_rewards(rewards, lengths, longest)
    counted = (weights > 0)[:, None]
    return metrics | {
        "accuracy": metrics["accuracy_100"],
        "margin": _mean(full[:, 0] - full[:, 1], weights),
        "reward_mean": _mean(full.mean(axis=1), weights),
        "reward_min": jnp.where(counted, full, jnp.inf).min(),
        "reward_max": jnp.where(counted, full, -jnp.inf).max(),
    }


def _pair_loss(pair: Float[Array, "B 2"], margin: float, centring: float) -> Float[Array, "B"]:
    chosen, rejected = pair[:, 0], pair[:, 1]
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return loss + centring * jnp.square(chosen + rejected) if centring else loss


def _taken_prefixes(
    prefixes: Int[Array, "N"], longest: Int[Array, "B"], stride: int, minimum_length: int
) -> Bool[Array, "B N"]:
    left = longest[:, None] - prefixes
    return (left == 0) | ((left > 0) & (left % stride == 0) & (prefixes >= minimum_length))


def _sample_prefixes(taken: Bool[Array, "B N"], sample: int, key: PRNGKeyArray) -> Bool[Array, "B N"]:
    """Keeps `sample` of each row's taken prefixes (all of them, if there are no more)."""
    draws = jnp.where(taken, jax.random.uniform(key, taken.shape), -1.0)
    threshold = jnp.sort(draws, axis=1, descending=True)[:, min(sample, taken.shape[1]) - 1]
    return taken & (draws >= threshold[:, None])


def _mean(values: Float[Array, "B"], weights: Float[Array, "B"]) -> Float[Array, ""]:
    return (values * weights).sum() / weights.sum()
