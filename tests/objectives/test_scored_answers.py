"""Objectives on scored answers: losses and gradients equal loops in NumPy and torch, cut into micro-batches too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from pargs_jax.commands.demo import demo_pairs
from pargs_jax.config import DataConfig, ObjectiveConfig, TrainConfig
from pargs_jax.data.batches import Batch
from pargs_jax.demo.task import oracle
from pargs_jax.errors import InputError
from pargs_jax.objectives.fudge import PrefixRegression
from pargs_jax.objectives.rad import RewardAugmented
from pargs_jax.objectives.td_lambda import TemporalDifference
from pargs_jax.testing import tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_train_step

LENGTHS = np.array([3, 1, 5, 2], np.int32)
WEIGHTS = np.array([1, 1, 1, 0], np.float32)
REWARDS = np.array([0.7, -1.5, 2.0, 50.0], np.float32)
LABELS = np.array([1, 0, 0.25, 1], np.float32)
ROWS = [0, 1, 2]  # those that count


def batch(rewards=REWARDS):
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, 61, (4, 3), np.int32),
        np.array([2, 3, 1, 1], np.int32),
        rng.integers(0, 61, (4, 1, 6), np.int32),
        LENGTHS[:, None],
        WEIGHTS,
        rewards=rewards[:, None],
    )


class Given:
    """Rewards of all prefixes, `[B 1 R]`, as a model would say them."""

    one_pass = True

    def __init__(self, rewards):
        self._rewards = rewards

    def rewards_at(self, lengths, *, descending=False):
        last = jnp.minimum(lengths, LENGTHS[:, None]) - 1
        return jnp.take_along_axis(self._rewards[:, 0], last, axis=1)[..., None]


def rad(values, rewards):
    total = 0.0
    for row in ROWS:
        n = int(LENGTHS[row])
        for t in range(1, n + 1):
            total = total + t * (values[row, t - 1] - rewards[row]) ** 2 * 2 / (n * (n + 1)) / len(ROWS)
    return total


def over_prefixes(loss_of):
    """The mean over the prefixes of all rows."""

    def loss(values, rewards):
        losses = [loss_of(values[row, : LENGTHS[row]], t, rewards[row]) for row in ROWS for t in range(LENGTHS[row])]
        return sum(losses) / len(losses)

    return loss


def labels_by_torch(values, t, label):
    return torch.nn.functional.binary_cross_entropy_with_logits(values[t], label)


def td(decay):
    """Half the squared distance to the lambda-return, as a mixture of all n-step returns."""

    def loss(values, t, reward):
        later = [*values.detach()[t + 1 :], reward]
        shares = [(1 - decay) * decay**i for i in range(len(later) - 1)]
        target = sum(share * value for share, value in zip(shares, later[:-1], strict=True))
        return (values[t] - target - (1 - sum(shares)) * reward) ** 2 / 2

    return loss


CASES = {
    "rad": (RewardAugmented(), rad, REWARDS),
    "fudge": (PrefixRegression(), over_prefixes(lambda values, t, reward: (values[t] - reward) ** 2 / 2), REWARDS),
    "fudge, labels": (PrefixRegression("label"), over_prefixes(labels_by_torch), LABELS),
    "td_lambda": (TemporalDifference(), over_prefixes(td(0.95)), REWARDS),
    "td_lambda, 0.3": (TemporalDifference(0.3), over_prefixes(td(0.3)), REWARDS),
    "td_lambda, 0": (TemporalDifference(0.0), over_prefixes(td(0.0)), REWARDS),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_a_loop_in_torch(case):
    loss, by_hand, rewards = CASES[case]
    values = np.random.default_rng(1).normal(size=(4, 1, 6)).astype(np.float32)
    ours, gradient = jax.value_and_grad(lambda x: loss(Given(x), batch(rewards)).loss)(jnp.asarray(values))
    theirs = torch.tensor(values[:, 0], dtype=torch.float64, requires_grad=True)
    expected = by_hand(theirs, torch.tensor(rewards, dtype=torch.float64))
    expected.backward()
    assert float(ours) == pytest.approx(expected.item(), abs=1e-5)
    np.testing.assert_allclose(gradient[:, 0], theirs.grad, atol=1e-5)
    assert not gradient[3].any() and gradient[0].any()


@pytest.mark.parametrize("case", ["rad", "fudge, labels", "td_lambda"])
def test_micro_batches_make_the_step_of_the_whole_batch(case):
    loss, _, rewards = CASES[case]
    model, params = tiny_model("gpt2", "reward")
    objective, optimizer = Objective(model, loss), optax.sgd(0.1)

    def step(accumulation):
        state = TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))
        some = jax.tree.map(lambda x: x[[0, 1, 2, 0]], batch(rewards))
        return make_train_step(objective, optimizer, accumulation=accumulation)(state, some, jax.random.key(0))

    (whole, metrics), (parts, part_metrics) = step(1), step(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts.params)
    assert metrics.keys() == part_metrics.keys()
    for name, value in metrics.items():
        assert float(part_metrics[name]) == pytest.approx(float(value), rel=1e-3), name


def test_metrics_are_of_full_answers():
    values = np.zeros((4, 1, 6), np.float32)
    values[[0, 1, 2, 3], 0, LENGTHS - 1] = [1.0, 0.5, 3.0, 9.0]
    metrics = RewardAugmented()(Given(jnp.asarray(values)), batch()).metrics
    assert float(metrics["squared_error"]) == pytest.approx(np.mean([0.3**2, 2.0**2, 1.0]))
    assert float(metrics["reward_mean"]) == pytest.approx(1.5)
    assert float(metrics["target_mean"]) == pytest.approx(0.4)


def test_accuracy_is_that_of_prefixes():
    values = np.full((4, 1, 6), 1.0, np.float32)
    values[2, 0, 3:] = -1.0  # label 0.25: right at two of five prefixes; row 0 at three, row 1 at none
    metrics = PrefixRegression("label")(Given(jnp.asarray(values)), batch(LABELS)).metrics
    assert float(metrics["accuracy"]) == pytest.approx((3 + 0 + 2) / 9)


def test_lambda_1_is_fudge():
    values = Given(jnp.asarray(np.random.default_rng(2).normal(size=(4, 1, 6)), jnp.float32))
    assert float(TemporalDifference(1.0)(values, batch()).loss) == pytest.approx(
        float(PrefixRegression()(values, batch()).loss), rel=1e-6
    )


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"td-lambda: got 1\.5, must be at most 1"):
        TrainConfig(objective=ObjectiveConfig(name="td_lambda", td_lambda=1.5)).validate()
    with pytest.raises(InputError, match="--best-metric: got 'accuracy', but rad has none; must be 'loss'"):
        TrainConfig(objective=ObjectiveConfig(name="rad"), best_metric="accuracy").validate()
    TrainConfig(objective=ObjectiveConfig(name="fudge", target="label"), best_metric="accuracy").validate()
    demo = TrainConfig(objective=ObjectiveConfig(name="fudge", target="label"))
    with pytest.raises(InputError, match="demo: its rewards are not labels from 0 to 1"):
        demo_pairs(demo, "train")


def test_the_demo_has_the_rewards_of_its_oracle():
    rows = demo_pairs(TrainConfig(objective=ObjectiveConfig(name="rad"), data=DataConfig(demo_pairs=8)), "train")
    assert [row.reward for row in rows] == [oracle(row.prompt, row.chosen) for row in rows]
    assert len({row.reward for row in rows}) > 2
