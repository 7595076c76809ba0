"""CD-Q and FaRMA: losses and gradients equal loops in torch; micro-batches make the step of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from pargs_jax.commands.train import check_start
from pargs_jax.config import ModelConfig, ObjectiveConfig, TrainConfig
from pargs_jax.data.batches import Batch
from pargs_jax.errors import InputError
from pargs_jax.models.hf import save_model
from pargs_jax.objectives.cd_q import ControlledDecoding
from pargs_jax.objectives.farma import FasterReward
from pargs_jax.testing import tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_train_step

LENGTHS = np.array([3, 1, 5, 2], np.int32)
REWARDS = np.array([0.7, -1.5, 2.0, 50.0], np.float32)


def batch(vocabulary):
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, vocabulary, (4, 3), np.int32),
        np.array([2, 3, 1, 1], np.int32),
        rng.integers(0, vocabulary, (4, 1, 6), np.int32),
        LENGTHS[:, None],
        np.array([1, 1, 1, 0], np.float32),
        rewards=REWARDS[:, None],
    )


class Given:
    def __init__(self, logits, tokens):
        self._logits, self._tokens = logits, tokens

    def map_logits(self, function, *others):
        return function(self._logits, self._tokens, *(other._logits for other in others))


BACKUPS = {
    "expectation": lambda p, values: (p * values).sum(),
    "soft": lambda p, values: (p * values.exp()).sum().log(),
    "max": lambda p, values: values.max(),
}


@pytest.mark.parametrize("backup", BACKUPS)
def test_loss_and_gradient_are_those_of_a_loop_in_torch(backup):
    rng = np.random.default_rng(1)
    table, logits = rng.normal(size=(2, 4, 1, 6, 7)).astype(np.float32)
    rows = batch(vocabulary=7)

    def loss(x):
        return ControlledDecoding(backup)(Given(x, rows.answers), rows, reference=Given(logits, rows.answers)).loss

    ours, gradient = jax.value_and_grad(loss)(jnp.asarray(table))
    theirs = torch.tensor(table[:, 0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor(logits[:, 0], dtype=torch.float64).softmax(-1)
    losses = []
    for row in range(3):
        for t in range(LENGTHS[row]):
            target = REWARDS[row]
            if t < LENGTHS[row] - 1:
                target = BACKUPS[backup](p[row, t + 1], theirs[row, t + 1].detach())
            losses.append((theirs[row, t, rows.answers[row, 0, t]] - target) ** 2 / 2)
    expected = sum(losses) / len(losses)
    expected.backward()
    assert float(ours) == pytest.approx(expected.item(), abs=1e-5)
    np.testing.assert_allclose(gradient[:, 0], theirs.grad, atol=1e-5)


def test_micro_batches_make_the_step_of_the_whole_batch():
    model, params = tiny_model("gpt2", "table")
    reference = {"reference": tiny_model("gpt2", "table", seed=1)[1]}
    objective = Objective(model, ControlledDecoding(), frozen=(("reference", model),))
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


def test_a_table_is_not_the_language_model_to_start_from(tmp_path):
    model, params = tiny_model("gpt2", "table")
    save_model(tmp_path / "table", model, params)
    config = TrainConfig(
        objective=ObjectiveConfig(name="cd_q"), model=ModelConfig(init=str(tmp_path / "table")), max_length=16
    )
    with pytest.raises(InputError, match=r"--model.init: .*table has a table of rewards already; cd_q starts from"):
        check_start(config)


# FaRMA.


def pairs(vocabulary):
    """Ragged pairs, the last of which is filler; the chosen answer of the second has one token."""
    rng = np.random.default_rng(2)
    return Batch(
        rng.integers(0, vocabulary, (4, 3), np.int32),
        np.array([2, 3, 1, 1], np.int32),
        rng.integers(0, vocabulary, (4, 2, 6), np.int32),
        np.array([[3, 2], [1, 6], [5, 4], [2, 2]], np.int32),
        np.array([1, 0.5, 1, 0], np.float32),
    )


def two_losses(table, rows, shortest):
    """FaRMA's losses as loops over rows and prefixes in torch."""
    full, consistency = 0.0, 0.0
    for row in range(3):
        chosen, rejected = (
            table[row, answer, n - 1, rows.answers[row, answer, n - 1]]
            for answer, n in enumerate(rows.answer_lengths[row])
        )
        full = full - torch.nn.functional.logsigmoid(chosen - rejected) * float(rows.weights[row])
        errors = [
            (table[row, 0, t - 1, rows.answers[row, 0, t - 1]] - table[row, 0, t].max()) ** 2
            for t in range(shortest, rows.answer_lengths[row, 0])
        ]
        if errors:
            consistency = consistency + sum(errors) / len(errors) * float(rows.weights[row])
    return full / 2.5, consistency / 2.5


@pytest.mark.parametrize("shortest", [1, 3])
def test_farma_alternates_between_two_losses_that_are_those_of_loops_in_torch(shortest):
    rows = pairs(vocabulary=7)
    table = np.random.default_rng(3).normal(size=(4, 2, 6, 7)).astype(np.float32)
    farma = FasterReward(phase_steps=2, minimum_length=shortest)
    compute = jax.jit(jax.value_and_grad(lambda x, step: farma(Given(x, rows.answers), rows, step=step).loss))
    for step in range(5):
        theirs = torch.tensor(table, dtype=torch.float64, requires_grad=True)
        expected = two_losses(theirs, rows, shortest)[step // 2 % 2]
        expected.backward()
        ours, gradient = compute(jnp.asarray(table), jnp.asarray(step))
        assert float(ours) == pytest.approx(expected.item(), abs=1e-5), step
        np.testing.assert_allclose(gradient, theirs.grad, atol=1e-5)
    full, consistency = two_losses(torch.tensor(table), rows, shortest)
    both, metrics, weight = farma(Given(jnp.asarray(table), rows.answers), rows, step=None)
    assert float(both) == pytest.approx(float(full + consistency), abs=1e-5) and weight == 2.5
    assert float(metrics["full_loss"]) == pytest.approx(float(full), abs=1e-5)
    deviations = [table[row, 0, : rows.answer_lengths[row, 0]].std(axis=-1).mean() for row in range(3)]
    assert float(metrics["spread"]) == pytest.approx(np.dot(deviations, [1, 0.5, 1]) / 2.5, abs=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_micro_batches_make_farmas_step_of_the_whole_batch(number):
    model, params = tiny_model("gpt2", "table")
    optimizer = optax.sgd(0.1)

    def step(accumulation):
        state = TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.asarray(number, jnp.int32))
        objective = Objective(model, FasterReward(phase_steps=1))
        return make_train_step(objective, optimizer, accumulation=accumulation)(
            state, pairs(vocabulary=61), jax.random.key(0)
        )

    (whole, metrics), (parts, part_metrics) = step(1), step(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts.params)
    for name, value in metrics.items():
        assert float(part_metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert float(metrics["loss"]) == pytest.approx(float(metrics[("full_loss", "consistency")[number]]), rel=1e-5)
