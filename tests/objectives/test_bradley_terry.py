"""Bradley-Terry on full answers and on all prefixes, against the paper's equations as plain loops."""

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.objectives.bradley_terry import bradley_terry, partial_bradley_terry

WIDTH = 7
LENGTHS = np.array([[5, 3], [2, 7], [1, 1], [4, 4], [7, 1]])
WEIGHTS = np.array([1.0, 0.0, 1.0, 1.0, 1.0], np.float32)


PAST_THE_END = np.arange(WIDTH) >= LENGTHS[..., None]


def some_rewards(fill=np.nan):
    rewards = np.random.default_rng(0).normal(size=(5, 2, WIDTH)).astype(np.float32)
    return np.where(PAST_THE_END, np.float32(fill), rewards)


def pair_loss(rewards, lengths, prefix, margin=0.0, centring=0.0):
    """-log sigmoid(r(y_w[:i]) - r(y_l[:i]) - margin), an answer that is over staying at its last prefix."""
    chosen, rejected = (float(r[min(prefix, n) - 1]) for r, n in zip(rewards, lengths, strict=True))
    return math.log1p(math.exp(-(chosen - rejected - margin))) + centring * (chosen + rejected) ** 2


def mean_over_pairs(losses):
    return sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS)


def naive_full(rewards, **options):
    """Eq. 1."""
    return mean_over_pairs(pair_loss(r, n, max(n), **options) for r, n in zip(rewards, LENGTHS, strict=True))


def naive_partial(rewards, *, prefix_weights="uniform", stride=1, minimum_length=1, **options):
    """Eq. 5, the mean over a pair's prefixes, then over pairs."""
    losses = []
    for r, n in zip(rewards, LENGTHS, strict=True):
        total = shares = 0.0
        for prefix in range(1, max(n) + 1):
            is_full = prefix == max(n)
            if not is_full and (prefix < minimum_length or (max(n) - prefix) % stride):
                continue
            share = prefix if prefix_weights == "linear" else 1
            total += share * pair_loss(r, n, prefix, **options)
            shares += share
        losses.append(total / shares)
    return mean_over_pairs(losses)


def value_and_gradient(loss, rewards, **options):
    def weighted(rewards):
        return loss(rewards, jnp.asarray(LENGTHS), jnp.asarray(WEIGHTS), **options)[0]

    value, gradient = jax.value_and_grad(weighted)(jnp.asarray(rewards))
    return float(value), np.asarray(gradient)


@pytest.mark.parametrize("options", [{}, {"margin": 0.7}, {"centring": 0.3}, {"margin": 0.7, "centring": 0.3}])
def test_the_full_loss_is_equation_1(options):
    rewards = some_rewards()
    value, gradient = value_and_gradient(bradley_terry, rewards, **options)
    assert value == pytest.approx(naive_full(rewards, **options), rel=1e-5)
    # It looks at nothing but the last token of either answer, and not at pairs of weight 0.
    moved = {tuple(place) for place in np.argwhere(gradient != 0)}
    assert moved == {(b, a, LENGTHS[b, a] - 1) for b in range(5) for a in range(2) if WEIGHTS[b]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_weights": "linear"},
        {"stride": 3},
        {"stride": 20},
        {"minimum_length": 4},
        {"minimum_length": 20},
        {"margin": 0.7, "centring": 0.3},
        {"prefix_weights": "linear", "stride": 2, "minimum_length": 3, "margin": 0.7, "centring": 0.3},
    ],
    ids=str,
)
def test_the_partial_loss_is_equation_5(options):
    rewards = some_rewards()
    value, _ = partial_bradley_terry(jnp.asarray(rewards), jnp.asarray(LENGTHS), jnp.asarray(WEIGHTS), **options)
    assert float(value) == pytest.approx(naive_partial(rewards, **options), rel=1e-5)


@pytest.mark.parametrize("loss", [bradley_terry, partial_bradley_terry])
def test_tokens_after_an_answers_end_change_nothing(loss):
    value, gradient = value_and_gradient(loss, some_rewards(fill=np.nan))
    other_value, other_gradient = value_and_gradient(loss, some_rewards(fill=1e6))
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    assert (gradient[PAST_THE_END] == 0).all()


@pytest.mark.parametrize("loss", [bradley_terry, partial_bradley_terry])
def test_hopeless_and_perfect_pairs_have_finite_losses_and_gradients(loss):
    signs = np.array([1, 1, 1, -1, -1], np.float32)[:, None, None] * np.array([-1, 1], np.float32)[:, None]
    value, gradient = value_and_gradient(loss, np.broadcast_to(1e4 * signs, (5, 2, WIDTH)))
    assert value == pytest.approx(1e4)  # the mean of 2e4, 2e4, 0 and 0
    np.testing.assert_allclose(gradient.sum(axis=2), 0.25 * (WEIGHTS * [1, 1, 1, 0, 0])[:, None] * [-1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("sample", "options", "expected"),
    [
        (3, {}, [3, 3, 1, 3, 3]),
        (100, {}, [5, 7, 1, 4, 7]),
        (2, {"stride": 3, "minimum_length": 2}, [2, 2, 1, 1, 2]),  # of prefixes 2 5 | 4 7 | 1 | 4 | 4 7
    ],
    ids=str,
)
def test_a_sample_is_of_that_many_prefixes_and_right_on_average(sample, options, expected):
    @partial(jax.jit, static_argnums=0)
    @partial(jax.grad, argnums=1)
    def gradient(sample, rewards, key):
        arrays = rewards, jnp.asarray(LENGTHS), jnp.asarray(WEIGHTS)
        return partial_bradley_terry(*arrays, sample=sample, key=key, **options)[0]

    keys = jax.random.split(jax.random.key(0), 400)
    sampled = np.stack([gradient(sample, some_rewards(), key) for key in keys])
    # Every prefix of a pair moves a reward of its own in the longer answer.
    counts = (sampled != 0).sum(axis=-1).max(axis=-1)
    np.testing.assert_array_equal(counts, np.broadcast_to(expected * (WEIGHTS > 0), counts.shape))
    standard_error = sampled.std(axis=0) / math.sqrt(len(sampled))
    error = np.abs(sampled.mean(axis=0) - gradient(None, some_rewards(), None))
    np.testing.assert_array_less(error, 4.5 * standard_error + 1e-5)


def test_a_sample_needs_a_key():
    with pytest.raises(ValueError, match="key"):
        partial_bradley_terry(jnp.zeros((1, 2, 3)), jnp.full((1, 2), 3), sample=1)


def test_metrics_are_as_counted_by_hand():
    rewards = some_rewards()
    rewards[3, :, 0] = 0.5  # the answers of this pair begin alike
    rewards[1, 0, 1], rewards[1, 1, 6] = 100, -100  # full answers, of weight 0
    rewards[4, 0, 2] = 50  # a prefix that is no full answer
    metrics = jax.device_get(bradley_terry(*map(jnp.asarray, (rewards, LENGTHS, WEIGHTS)))[1])

    def wins(percent):
        for r, n in zip(rewards, LENGTHS, strict=True):
            prefix = math.ceil(Fraction(max(n) * percent, 100))
            chosen, rejected = (r[a, min(prefix, n[a]) - 1] for a in range(2))
            yield 0.5 if chosen == rejected else float(chosen > rejected)

    for percent in (10, 25, 50, 75, 100):
        assert metrics[f"accuracy_{percent}"] == pytest.approx(mean_over_pairs(wins(percent)))
    assert (metrics["accuracy_10"] * 4) % 1 == 0.5  # that tie
    full = np.array([[r[a, n[a] - 1] for a in range(2)] for r, n in zip(rewards, LENGTHS, strict=True)])[WEIGHTS > 0]
    assert metrics["accuracy"] == metrics["accuracy_100"]
    assert metrics["margin"] == pytest.approx((full[:, 0] - full[:, 1]).mean(), rel=1e-5)
    assert metrics["reward_mean"] == pytest.approx(full.mean(), rel=1e-5)
    assert (metrics["reward_min"], metrics["reward_max"]) == (full.min(), full.max())


def test_weights_default_to_one_and_may_be_fractions():
    rewards, lengths = jnp.asarray(some_rewards()), jnp.asarray(LENGTHS)
    alone = [float(bradley_terry(rewards, lengths, jnp.asarray(row))[0]) for row in np.eye(5, dtype=np.float32)]
    assert float(bradley_terry(rewards, lengths)[0]) == pytest.approx(np.mean(alone))
    weights = np.array([3, 0.5, 0, 1, 0], np.float32)
    weighted = float(bradley_terry(rewards, lengths, jnp.asarray(weights))[0])
    assert weighted == pytest.approx((weights * alone).sum() / 4.5)
