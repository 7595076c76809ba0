"""Contrastive twist learning: the loss of loops in torch, and by enumeration the optimal twists as its minimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from pargs_jax.data.batches import Batch
from pargs_jax.objectives.ctl import ContrastiveTwist
from pargs_jax.objectives.twists import contrastive_twist_loss, twists_of
from pargs_jax.testing import tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_train_step

LENGTHS = np.array([[2, 4, 1], [3, 3, 2], [1, 1, 1]], np.int32)
WEIGHTS = np.array([1, 0.5, 0], np.float32)
REWARDS = np.array([[0.3, -1, 2], [0, 0.5, 1], [9, 9, 9]], np.float32)


def batch(vocabulary):
    """Ragged samples of three prompts, of which the last is filler."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(0, vocabulary, (3, 3), np.int32), rng.integers(0, vocabulary, (3, 3, 5), np.int32)
    return Batch(prompts, np.array([2, 3, 1], np.int32), answers, LENGTHS, WEIGHTS, rewards=REWARDS)


class Given:
    def __init__(self, logits, tokens):
        self._logits, self._tokens = logits, tokens

    def map_logits(self, function, *others):
        return function(self._logits, self._tokens, *(other._logits for other in others))


def test_loss_and_gradient_are_those_of_loops_in_torch():
    rng = np.random.default_rng(1)
    table, logits = rng.normal(size=(2, 3, 3, 5, 7)).astype(np.float32)
    rows = batch(vocabulary=7)

    def loss(x):
        outputs, reference = (Given(each, rows.answers) for each in (x, logits))
        return ContrastiveTwist(n=3, reward_weight=0.7)(outputs, rows, reference=reference).loss

    ours, gradient = jax.value_and_grad(loss)(jnp.asarray(table))
    theirs = torch.tensor(table, dtype=torch.float64, requires_grad=True)
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    total = 0.0
    for row in range(2):
        sigma = (0.7 * torch.tensor(REWARDS[row], dtype=torch.float64)).softmax(0)
        losses = []
        for t in range(LENGTHS[row].max()):
            positive, negative = 0.0, 0.0
            for n, length in enumerate(LENGTHS[row]):
                at = min(t, length - 1)
                psi = theirs[row, n, at, rows.answers[row, n, at]]
                positive = positive + sigma[n] * psi
                expected = (p[row, n, t] * theirs[row, n, t].exp()).sum() if t < length else psi.exp()
                negative = negative + expected / 3
            losses.append(negative.log() - positive)
        total = total + sum(losses) / len(losses) * float(WEIGHTS[row])
    total = total / 1.5
    total.backward()
    assert float(ours) == pytest.approx(total.item(), abs=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)


def test_the_optimal_twists_are_its_minimum_by_enumeration():
    """Over three tokens, the last of which ends a text, of at most two tokens; samples in proportion to p."""
    first, second = np.array([0.5, 0.25, 0.25]), np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])
    texts = [(2,), *itertools.product((0, 1), range(3))]
    chances = {text: first[text[0]] * (second[text] if len(text) > 1 else 1) for text in texts}
    phi = dict(zip(texts, np.random.default_rng(2).uniform(0.2, 3, len(texts)), strict=True))
    samples = [text for text in texts for _ in range(round(16 * chances[text]))]
    assert len(samples) == 16 and sum(chances.values()) == 1
    answers = np.array([[[*text, 0][:2] for text in samples]])
    lengths = np.array([[len(text) for text in samples]])
    log_probs = np.log([[[first, second[text[0]] if len(text) > 1 else first] for text in samples]])
    log_targets = np.log([[phi[text] for text in samples]])

    def loss(twists):
        # A table is a function of the prefix: one row for the empty one, and one for each first token.
        table = jnp.stack([jnp.stack([twists[0], twists[1 + text[0] % 2]]) for text in samples])[None]
        return contrastive_twist_loss(*twists_of(table, answers, log_probs), lengths, log_targets, jnp.ones(1))[0]

    last = np.array([[phi[0, v] for v in range(3)], [phi[1, v] for v in range(3)]])
    optimum = np.log([[*(second * last).sum(axis=1), phi[2,]], *last])
    slopes = jax.grad(loss)
    np.testing.assert_allclose(slopes(jnp.asarray(optimum, jnp.float32)), 0, atol=1e-6)
    shifted = optimum + np.random.default_rng(3).normal(size=optimum.shape)
    assert np.abs(slopes(jnp.asarray(shifted, jnp.float32))).max() > 0.01
    assert loss(jnp.asarray(shifted, jnp.float32)) > loss(jnp.asarray(optimum, jnp.float32))
    # A constant makes no difference, and at the minimum the loss is -KL(sigma_t || p), averaged over t.
    assert float(loss(jnp.asarray(optimum + 3, jnp.float32))) == pytest.approx(float(loss(optimum)), abs=1e-5)
    sigma = {text: chances[text] * phi[text] for text in texts}
    z = sum(sigma.values())
    whole = sum(s / z * np.log(phi[text] / z) for text, s in sigma.items())
    marginal = sum(p * np.exp(x) / z * (x - np.log(z)) for p, x in zip(first, optimum[0], strict=True))
    assert float(loss(optimum)) == pytest.approx(-(whole + marginal) / 2, abs=1e-5)


def test_micro_batches_make_the_step_of_the_whole_batch():
    model, params = tiny_model("gpt2", "table")
    reference = {"reference": tiny_model("gpt2", "table", seed=1)[1]}
    objective = Objective(model, ContrastiveTwist(n=3), frozen=(("reference", model),))
    optimizer = optax.sgd(0.1)
    rows = jax.tree.map(lambda x: x[[0, 1, 2, 0]], batch(vocabulary=61))

    def step(accumulation):
        state = TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))
        return make_train_step(objective, optimizer, accumulation=accumulation)(
            state, rows, jax.random.key(0), reference
        )

    (whole, metrics), (parts, part_metrics) = step(1), step(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts.params)
    for name, value in metrics.items():
        assert float(part_metrics[name]) == pytest.approx(float(value), rel=1e-3), name
