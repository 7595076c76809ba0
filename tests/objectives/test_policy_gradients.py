"""Advantages against numbers worked by hand, losses and their gradients against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pargs_jax.data.batches import Batch
from pargs_jax.objectives.policy_gradients import (
    advantages_by_gae,
    clipped_gain,
    leave_one_out,
    policy_numbers,
    ppo_loss,
    rloo_loss,
    token_rewards,
    whitened,
)
from pargs_jax.objectives.ppo import ProximalPolicy
from pargs_jax.objectives.rloo import LeaveOneOut

REWARDS = jnp.array([[1.0, 0.0, 2.0], [3.0, 4.0, 9.0]])
VALUES = jnp.array([[0.5, 1.0, 1.5], [1.0, 2.0, 7.0]])  # the 9 and the 7 are beyond the end of the second answer
LENGTHS = jnp.array([3, 2])
ROWS, SLOTS, VOCABULARY = 4, 5, 7


def test_generalised_advantages_by_hand():
    # First answer, from its end: d = 2 - 1.5, 0 + 0.5 * 1.5 - 1, 1 + 0.5 * 1 - 0.5; each A = d + 0.5 * 0.5 * next A.
    found = advantages_by_gae(REWARDS, VALUES, LENGTHS, 0.5, 0.5)
    np.testing.assert_allclose(found, [[0.96875, -0.125, 0.5], [3.5, 2.0, 0.0]], atol=1e-6)
    # lambda 1: all later rewards minus the value; lambda 0: one step and the next value.
    whole = advantages_by_gae(REWARDS, VALUES, LENGTHS, 1.0, 1.0)
    np.testing.assert_allclose(whole, [[2.5, 1.0, 0.5], [6.0, 2.0, 0.0]], atol=1e-6)
    one_step = advantages_by_gae(REWARDS, VALUES, LENGTHS, 1.0, 0.0)
    np.testing.assert_allclose(one_step, [[1.5, 0.5, 0.5], [4.0, 2.0, 0.0]], atol=1e-6)


def test_the_penalty_is_on_every_token_and_the_reward_on_the_last():
    log_ratios = jnp.array([[0.1, -0.2, 0.3], [1.0, 2.0, 0.0]])
    found = token_rewards(jnp.array([5.0, -1.0]), log_ratios, LENGTHS, 0.5)
    np.testing.assert_allclose(found, [[-0.05, 0.1, 4.85], [-0.5, -2.0, 0.0]], atol=1e-6)


def test_whitening_counts_real_tokens_only():
    found = whitened(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]]), LENGTHS)
    np.testing.assert_allclose(found, np.array([[-2, -1, 0], [1, 2, 0]]) / np.sqrt(2), atol=1e-6)


def test_only_gains_are_clipped():
    ratios, advantages = jnp.array([1.5, 1.5, 0.5, 0.5, 1.1]), jnp.array([2.0, -2.0, 2.0, -2.0, 2.0])
    gains, is_clipped = clipped_gain(jnp.log(ratios), advantages, 0.2)
    np.testing.assert_allclose(gains, [2.4, -3.0, 1.0, -1.6, 2.2], rtol=1e-6)
    assert is_clipped.tolist() == [True, False, False, True, False]


def test_the_baseline_is_the_mean_of_the_others():
    found = leave_one_out(jnp.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    np.testing.assert_allclose(found, [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], atol=1e-6)


def test_what_ppo_learns_from_by_hand():
    """A penalty of 0.5 and a reward of 1 after two tokens: rewards -0.2 and 1.1, and no value beyond the end."""
    loss = ProximalPolicy(kl_weight=0.5, gae_lambda=1.0)
    numbers = jnp.array([[-1.0, -2.0, 0.0]]), jnp.array([[0.4, -0.2, 0.0]])
    rollout = loss.learn_from(jnp.ones(1), *numbers, jnp.array([2]), jnp.array([[0.5, 0.3, 8.0]]))
    np.testing.assert_allclose(rollout.returns, [[0.9, 1.1, 0.0]], atol=1e-6)
    np.testing.assert_allclose(rollout.advantages, [[-1.0, 1.0, 0.0]], atol=1e-6)  # 0.4 and 0.8, whitened
    np.testing.assert_array_equal(rollout.log_probs, numbers[0])


def test_what_rloo_learns_from_by_hand():
    ratios = jnp.array([[1.0, 1.0], [0.0, 0.0], [2.0, 0.0], [0.0, -2.0]])
    rollout = LeaveOneOut(kl_weight=0.5, n=2).learn_from(
        jnp.array([3.0, 1.0, 0.0, 0.0]), ratios, ratios, jnp.full(4, 2), None
    )
    np.testing.assert_allclose(rollout.advantages, [1.0, -1.0, -2.0, 2.0], atol=1e-6)  # of 2, 1, -1 and 1


@pytest.fixture(scope="module")
def arrays():
    """Logits, tokens, and numbers of an older policy that differs from them; ragged rows, the last one filler."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(ROWS, SLOTS, VOCABULARY)).astype(np.float32)
    answers = rng.integers(0, VOCABULARY, (ROWS, SLOTS))
    lengths, weights = np.array([5, 1, 3, 2]), np.array([1, 1, 1, 0], np.float32)
    real = np.arange(SLOTS) < lengths[:, None]
    said = torch.log_softmax(torch.tensor(logits) / 0.8, -1).gather(-1, torch.tensor(answers)[..., None])[..., 0]
    old = np.where(real, said.numpy() + rng.normal(size=real.shape) * 0.3, 0).astype(np.float32)
    floats = (rng.normal(size=(ROWS, SLOTS)).astype(np.float32) for _ in range(3))
    return logits, answers, lengths, weights, real, old, *floats


def torch_log_probs(logits, answers):
    return torch.log_softmax(logits / 0.8, -1).gather(-1, torch.tensor(answers)[..., None])[..., 0]


def test_log_probabilities_and_distances_are_torchs(arrays):
    logits, answers, lengths, _, real, *_ = arrays
    reference = logits[::-1].copy()
    found = policy_numbers(logits, reference, answers, lengths, 0.8)
    said, before = (torch.log_softmax(torch.tensor(x) / 0.8, -1) for x in (logits, reference))
    kls = torch.nn.functional.kl_div(before, said, log_target=True, reduction="none").sum(-1).numpy()
    np.testing.assert_allclose(found.kls, np.where(real, kls, 0), atol=1e-5)
    own, others = (torch_log_probs(torch.tensor(x), answers).numpy() for x in (logits, reference))
    np.testing.assert_allclose(found.log_probs, np.where(real, own, 0), atol=1e-5)
    np.testing.assert_allclose(found.log_ratios, np.where(real, own - others, 0), atol=1e-5)


def test_ppo_equals_torch(arrays):
    logits, answers, _, weights, real, old, advantages, returns, values = arrays
    counted = (real * weights[:, None]).astype(np.float32)

    def ours(logits, values):
        numbers = {"temperature": 0.8, "clip": 0.2, "value_weight": 0.1}
        return ppo_loss(logits, values, answers, old, advantages, returns, counted, **numbers)

    (loss, metrics), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(logits, values)
    theirs = [torch.tensor(x, requires_grad=True) for x in (logits, values)]
    mask, goal = torch.tensor(counted), torch.tensor(advantages)
    ratio = torch.exp(torch_log_probs(theirs[0], answers) - torch.tensor(old))
    policy = torch.max(-goal * ratio, -goal * ratio.clamp(0.8, 1.2))
    squared = 0.5 * (theirs[1] - torch.tensor(returns)) ** 2
    expected = ((policy + 0.1 * squared) * mask).sum() / mask.sum()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert float(metrics["value_loss"]) == pytest.approx(((squared * mask).sum() / mask.sum()).item(), rel=1e-5)
    clipped = (-goal * ratio.clamp(0.8, 1.2) > -goal * ratio).float()
    assert 0 < float(metrics["clip_share"]) == pytest.approx(((clipped * mask).sum() / mask.sum()).item())
    for own, other in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(own, other.grad, atol=1e-6)
        assert np.abs(own).max() > 1e-3


@pytest.mark.parametrize("first_update", [True, False])
def test_rloo_equals_torch(arrays, first_update):
    """In a step's first update it is REINFORCE: the gradient is that of `-A log pi(y)`."""
    logits, answers, lengths, weights, real, old, advantages, *_ = arrays
    goal = advantages[:, 0]
    if first_update:
        old = np.where(real, torch_log_probs(torch.tensor(logits), answers).numpy(), 0)

    def ours(logits):
        return rloo_loss(logits, answers, lengths, old, goal, weights, temperature=0.8, clip=0.2)

    (loss, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(logits)
    theirs, rows = torch.tensor(logits, requires_grad=True), torch.tensor(weights)
    log_probs = (torch_log_probs(theirs, answers) * torch.tensor(real)).sum(1)
    ratio = torch.exp(log_probs - torch.tensor(old.sum(1)))
    plain, cut = torch.tensor(goal) * ratio, torch.tensor(goal) * ratio.clamp(0.8, 1.2)
    expected = -(torch.min(plain, cut) * rows).sum() / rows.sum()
    reinforce = -(torch.tensor(goal) * log_probs * rows).sum() / rows.sum()
    (reinforce if first_update else expected).backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert (float(metrics["clip_share"]) > 0) == (not first_update)
    np.testing.assert_allclose(gradient, theirs.grad, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


def test_losses_read_batches_and_leave_filler_out(arrays):
    """Through the classes: filler rows and slots beyond the end change nothing."""
    logits, answers, lengths, weights, real, old, _, returns, values = arrays

    class Outputs:
        def __init__(self, logits):
            self.logits = lambda: jnp.asarray(logits)[:, None]

    def loss_of(filler):
        changed = np.where((real * weights[:, None] > 0)[..., None], logits, filler)
        batch = Batch(None, None, answers[:, None], lengths[:, None], weights)
        ppo, rloo = ProximalPolicy(), LeaveOneOut()
        of_ppo = ppo.learn_from(returns[:, 0], old, old, jnp.asarray(lengths), jnp.asarray(values))
        of_rloo = rloo.learn_from(returns[:, 0], old, old, jnp.asarray(lengths), None)
        one = ppo(Outputs(changed), batch._replace(rollout=of_ppo), values=jnp.asarray(values)[:, None])
        return one, rloo(Outputs(changed), batch._replace(rollout=of_rloo))

    for one, other in zip(loss_of(0.0), loss_of(60 * logits), strict=True):
        assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-6)
        assert float(one.weight) == float(other.weight)
    assert (float(loss_of(0.0)[0].weight), float(loss_of(0.0)[1].weight)) == (9, 3)
