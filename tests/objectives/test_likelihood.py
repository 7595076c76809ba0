"""The next-token loss, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.objectives.likelihood import answer_likelihood

LENGTHS = np.array([4, 1, 6, 3])
WEIGHTS = np.array([1.0, 0.0, 1.0, 0.5], np.float32)


def some_logits():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(4, 6, 11)).astype(np.float32), rng.integers(0, 11, (4, 6))


def value_and_gradient(logits, answers, weights=None):
    def loss(logits):
        return answer_likelihood(logits, jnp.asarray(answers), jnp.asarray(LENGTHS), weights)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    return float(value), np.asarray(gradient)


def test_loss_and_gradient_are_those_of_torch():
    torch = pytest.importorskip("torch")
    logits, answers = some_logits()
    real = np.arange(6) < LENGTHS[:, None]
    reference = torch.tensor(logits, requires_grad=True)
    targets = torch.tensor(np.where(real, answers, -100))
    expected = torch.nn.functional.cross_entropy(reference.flatten(0, 1), targets.flatten())
    expected.backward()
    value, gradient = value_and_gradient(logits, answers)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, reference.grad, atol=1e-6)


def test_weights_count_rows_by_their_tokens():
    logits, answers = some_logits()
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    total = tokens = hits = 0.0
    for b, (length, weight) in enumerate(zip(LENGTHS, WEIGHTS, strict=True)):
        for i in range(length):
            total -= weight * log_probs[b, i, answers[b, i]]
            hits += weight * (logits[b, i].argmax() == answers[b, i])
            tokens += weight
    loss, metrics = answer_likelihood(
        jnp.asarray(logits), jnp.asarray(answers), jnp.asarray(LENGTHS), jnp.asarray(WEIGHTS)
    )
    assert float(loss) == pytest.approx(total / tokens, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(hits / tokens)
    assert 0 < hits < tokens


def test_tokens_after_an_answers_end_change_nothing():
    logits, answers = some_logits()
    value, gradient = value_and_gradient(logits, answers, jnp.asarray(WEIGHTS))
    padding = np.arange(6) >= LENGTHS[:, None]
    other_logits, other_answers = np.where(padding[..., None], 1e30, logits), np.where(padding, 7, answers)
    other_value, other_gradient = value_and_gradient(other_logits, other_answers, jnp.asarray(WEIGHTS))
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    assert (gradient[padding] == 0).all() and (gradient[1] == 0).all()
