"""Bradley-Terry losses on pairs of answers: on the full answers, and on all their prefixes (PARGS).

Rewards are `[B 2 R]`, chosen first: entry i-1 is the reward of the answer's first i tokens. An answer of n tokens has n
prefixes. Beyond its end, the reward of the whole answer is repeated, which is what the paper's padding means.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pargs_jax.objectives.contract import Outputs

Metrics = dict[str, Array]
FRACTIONS = (10, 25, 50, 75, 100)
"""Percentages of the longer answer's length at which accuracy is reported."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """The prefixes of each pair that a loss compares, longest first."""

    lengths: Int[Array, "B N"]
    """In tokens, at least 1. Entry n is at most R - n * stride, where R is the answers' padded length."""
    weights: Float[Array, "B N"]
    """Weights in the mean over a pair's prefixes; 0 for entries that are only padding."""
    has_full: bool = dataclasses.field(default=True, metadata={"static": True})
    """Whether the full answers are certainly included."""
    has_all: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether all prefixes are included."""


def bradley_terry(
    rewards: Float[Array, "B 2 R"],
    lengths: Int[Array, "B 2"],
    weights: Float[Array, "B"] | None = None,
    *,
    margin: float = 0.0,
    centring: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss on full answers: `-log sigmoid(r(y_w) - r(y_l))` (PARGS, Eq. 1), in nats per pair.

    Args:
        rewards: reward of every prefix of the chosen and the rejected answers, fp32.
        lengths: tokens of each answer, at least 1.
        weights: the weight of each pair; 0 leaves it out. Default: all 1.
        margin: subtracted from the difference (Touvron et al., 2023, Eq. 2, with the same margin for all pairs).
        centring: weight of `(r(y_w) + r(y_l))^2`, which keeps rewards around zero (Eisenstein et al., 2023).

    Returns:
        The weighted mean over pairs, and `prefix_metrics` at all `FRACTIONS`.
    """
    weights = jnp.ones(rewards.shape[0]) if weights is None else weights
    outputs = _GivenRewards(rewards, lengths)
    return preference_loss(outputs, lengths, weights, full_answers(lengths), margin=margin, centring=centring)


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

    The mean is over a pair's prefixes first, then over pairs, so long and short pairs count equally. A causal model
    gives all rewards in one pass, so this costs as much as the loss on full answers.

    Args:
        rewards, lengths, weights, margin, centring: as in `bradley_terry`.
        prefix_weights: `uniform`, or `linear`: proportional to i (Deng and Raffel, 2023).
        stride: take every n-th prefix, counted back from the full pair, which is always included.
        sample: take this many of a pair's prefixes at random, using `key`; all of them if there are no more.
        minimum_length: leave out prefixes shorter than this, but never the full pair.
        key: randomness for `sample`; required with it.
    """
    prefixes = choose_prefixes(
        lengths,
        rewards.shape[-1],
        weighting=prefix_weights,
        stride=stride,
        sample=sample,
        minimum_length=minimum_length,
        key=key,
    )
    weights = jnp.ones(rewards.shape[0]) if weights is None else weights
    return preference_loss(
        _GivenRewards(rewards, lengths), lengths, weights, prefixes, margin=margin, centring=centring
    )


def labelled_bradley_terry(
    differences: Float[Array, "B"],
    labels: Float[Array, "B M"],
    preferences: Float[Array, "B M"],
    weights: Float[Array, "B"],
) -> tuple[Float[Array, ""], Metrics]:
    """`-sum_i a_i (c_i log sigmoid(d) + (1 - c_i) log sigmoid(-d))`, the weighted mean over pairs, in nats:
    Bradley-Terry for several objectives, each with its own label (PARM, Lin et al., 2025).

    Args:
        differences: d, the reward of the first answer minus that of the second.
        labels: c, for each objective: 1 if the first answer is better, 0 if the second is, or a probability.
        preferences: a, the weights of the objectives; they sum to 1 in each row.
        weights: the weight of each pair.

    Returns:
        The loss; `accuracy`, the share of labels with which the difference agrees, weighted by the preferences (a tie
        counts half); and `margin`, the mean of the difference in the direction of the labels.
    """
    first = (preferences * labels).sum(axis=1)  # the chance that the first answer is better, for these preferences
    losses = -first * jax.nn.log_sigmoid(differences) - (1 - first) * jax.nn.log_sigmoid(-differences)
    direction = 2 * first - 1
    metrics = {
        "accuracy": _mean(0.5 + 0.5 * direction * jnp.sign(differences), weights),
        "margin": _mean(direction * differences, weights),
    }
    return _mean(losses, weights), metrics


def preference_loss(
    outputs: Outputs,
    counts: Int[Array, "B 2"],
    weights: Float[Array, "B"],
    prefixes: Prefixes,
    *,
    is_evaluation: bool = True,
    margin: float = 0.0,
    centring: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """The Bradley-Terry loss of these prefixes, and `prefix_metrics`, for every kind of model.

    Models with one pass give the metrics at all `FRACTIONS`. For other models, reading a prefix is expensive.
    Evaluation reads the prefixes at `FRACTIONS` in addition, unless the loss covers all prefixes. A training step reads
    no further prefixes. It reports all `FRACTIONS` if the loss covers all prefixes, only full answers if the loss
    certainly includes them, and nothing if prefixes were sampled.

    Args:
        outputs: the model's outputs for the pairs.
        counts: the number of prefixes of each answer.
        weights: the weight of each pair.
        prefixes: the prefixes to compare.
        is_evaluation: whether prefixes may be read for the metrics alone.
        margin, centring: as in `bradley_terry`.
    """
    longest = counts.max(axis=1)
    pairs = outputs.rewards_at(prefixes.lengths, descending=True)
    loss = prefix_loss(pairs, prefixes, weights, margin=margin, centring=centring)
    if outputs.one_pass:
        return loss, prefix_metrics(outputs.rewards_at(prefix_lengths(longest)), weights)
    if not prefixes.has_full:
        return loss, {}
    if is_evaluation and not prefixes.has_all:
        others = outputs.rewards_at(prefix_lengths(longest, FRACTIONS[:-1]))
        reported = jnp.concatenate([others, rewards_at(pairs, prefixes, longest[:, None])], axis=1)
        return loss, prefix_metrics(reported, weights)
    fractions = FRACTIONS if prefixes.has_all else FRACTIONS[-1:]
    reported = rewards_at(pairs, prefixes, prefix_lengths(longest, fractions))
    return loss, prefix_metrics(reported, weights, fractions)


class _GivenRewards(NamedTuple):
    """The part of `Outputs` that the loss needs, for given rewards of all prefixes."""

    rewards: Float[Array, "B 2 R"]
    lengths: Int[Array, "B 2"]
    one_pass: bool = True

    def rewards_at(self, lengths: Int[Array, "B N"], *, descending: bool = False) -> Float[Array, "B N 2"]:
        return jax.vmap(partial(prefix_rewards, self.rewards, self.lengths), in_axes=1, out_axes=1)(lengths)


def full_answers(counts: Int[Array, "B 2"]) -> Prefixes:
    """Only the full answers, as prefixes."""
    return Prefixes(counts.max(axis=1, keepdims=True), jnp.ones((len(counts), 1)))


def choose_prefixes(
    lengths: Int[Array, "B 2"],
    width: int,
    *,
    weighting: Literal["uniform", "linear"] = "uniform",
    stride: int = 1,
    sample: int | None = None,
    minimum_length: int = 1,
    key: PRNGKeyArray | None = None,
) -> Prefixes:
    """Chooses which prefixes of the longer answer are compared; `width` is R, the options are
    `partial_bradley_terry`'s.

    N is as small as the options allow, because some models read every prefix separately.
    """
    longest = lengths.max(axis=1, keepdims=True)
    chosen = longest - stride * jnp.arange(-(-width // stride))
    taken = (chosen == longest) | (chosen >= minimum_length)
    has_all = stride == 1 and minimum_length == 1 and sample is None
    if sample is not None and sample < chosen.shape[1]:
        if key is None:
            raise ValueError("sample needs a key")
        draws = jnp.where(taken, jax.random.uniform(key, taken.shape), -1.0)
        # In order of length: after leaving some out, entry n is still no longer than entry n was before.
        drawn = jnp.sort(jax.lax.top_k(draws, sample)[1], axis=1)
        chosen, taken = (jnp.take_along_axis(x, drawn, axis=1) for x in (chosen, taken))
    chosen = jnp.maximum(chosen, 1)
    weights = taken * (chosen if weighting == "linear" else jnp.ones_like(chosen)).astype(jnp.float32)
    return Prefixes(chosen, weights, has_full=sample is None, has_all=has_all)


def prefix_loss(
    pairs: Float[Array, "B N 2"],
    prefixes: Prefixes,
    weights: Float[Array, "B"],
    *,
    margin: float = 0.0,
    centring: float = 0.0,
) -> Float[Array, ""]:
    """The Bradley-Terry loss of given prefix rewards: the mean over a pair's prefixes, then over pairs."""
    losses = _pair_loss(pairs, margin, centring)
    per_pair = (losses * prefixes.weights).sum(axis=1) / prefixes.weights.sum(axis=1)
    return _mean(per_pair, weights)


def rewards_at(pairs: Float[Array, "B N 2"], prefixes: Prefixes, lengths: Int[Array, "B F"]) -> Float[Array, "B F 2"]:
    """Rewards of the prefixes of these lengths; each must be among the prefixes that were scored."""
    is_match = (prefixes.lengths[:, None, :] == lengths[..., None]) & (prefixes.weights[:, None, :] > 0)
    return jnp.take_along_axis(pairs, is_match.argmax(axis=-1)[..., None], axis=1)


def prefix_rewards(
    rewards: Float[Array, "B 2 R"], lengths: Int[Array, "B 2"], prefix: Int[Array, "*B"]
) -> Float[Array, "B 2"]:
    """Rewards of the first `prefix` tokens of each answer, or of the whole answer if it is shorter."""
    last = jnp.minimum(jnp.broadcast_to(prefix, lengths.shape[:1])[:, None], lengths) - 1
    return jnp.take_along_axis(rewards, last[..., None], axis=-1)[..., 0]


def prefix_lengths(longest: Int[Array, "B"], fractions: tuple[int, ...] = FRACTIONS) -> Int[Array, "B F"]:
    """These percentages of the longer answer's length, in tokens, rounded up."""
    return (longest[:, None] * jnp.array(fractions) + 99) // 100


def prefix_metrics(
    pairs: Float[Array, "B F 2"], weights: Float[Array, "B"], fractions: tuple[int, ...] = FRACTIONS
) -> Metrics:
    """The metrics of a batch, all fp32 scalars, from rewards at `fractions`: percentages, the last of which is 100.

    `accuracy` (share of pairs whose chosen answer has the higher reward, a tie counting half), `accuracy_10` ..
    `accuracy_100` (the same at that percentage of the longer answer, rounded up; answers that still agree tie),
    `margin` (mean reward difference), and over all full answers `reward_mean`, `reward_min`, `reward_max`.
    """
    metrics: Metrics = {
        f"accuracy_{percent}": _mean(0.5 + 0.5 * jnp.sign(pairs[:, f, 0] - pairs[:, f, 1]), weights)
        for f, percent in enumerate(fractions)
    }
    full = pairs[:, -1]
    counted = (weights > 0)[:, None]
    return metrics | {
        "accuracy": metrics["accuracy_100"],
        "margin": _mean(full[:, 0] - full[:, 1], weights),
        "reward_mean": _mean(full.mean(axis=1), weights),
        "reward_min": jnp.where(counted, full, jnp.inf).min(),
        "reward_max": jnp.where(counted, full, -jnp.inf).max(),
    }


def _pair_loss(pair: Float[Array, "*B 2"], margin: float, centring: float) -> Float[Array, "*B"]:
    chosen, rejected = pair[..., 0], pair[..., 1]
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return loss + centring * jnp.square(chosen + rejected) if centring else loss


def _mean(values: Float[Array, "B"], weights: Float[Array, "B"]) -> Float[Array, ""]:
    return (values * weights).sum() / weights.sum()
