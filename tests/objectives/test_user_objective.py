"""An objective that a user writes: IPO, with a frozen reference, as docs/adding_an_objective.md shows it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch
from pargs_jax.objectives.contract import Loss, LossResult
from pargs_jax.objectives.likelihood import token_log_probs
from pargs_jax.options import merged_options, option
from pargs_jax.testing import tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import begin, make_optimizer, make_train_step


@dataclass(frozen=True)
class IdentityPreference(Loss):
    name = "ipo"
    meaning = "the language model itself, with a bounded margin over a reference"
    head = "vocabulary"
    answers = 2
    frozen = ("reference",)

    tau: float = option(0.1, "weight of the KL divergence from the reference", above=0)

    def chance(self, vocab_size):
        return 1 / (2 * self.tau) ** 2

    def __call__(self, outputs, batch, key=None, *, reference):
        ratio = sums(outputs, batch) - sums(reference, batch)
        gain = ratio[:, 0] - ratio[:, 1]
        loss = ((gain - 1 / (2 * self.tau)) ** 2 * batch.weights).sum() / batch.weights.sum()
        accuracy = ((gain > 0) * batch.weights).sum() / batch.weights.sum()
        return LossResult(loss, {"accuracy": accuracy}, batch.weights.sum())


def sums(outputs, batch):
    """The log-probability of each answer, [B A]."""
    log_probs = outputs.map_logits(token_log_probs)
    return (log_probs * (jnp.arange(log_probs.shape[2]) < batch.answer_lengths[..., None])).sum(axis=2)


LENGTHS = np.array([[3, 1], [2, 4], [4, 4]], np.int32)
PROMPT_LENGTHS = np.array([2, 3, 1], np.int32)
WEIGHTS = np.array([1, 1, 0], np.float32)


def batch():
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(0, 61, (3, 3), np.int32), rng.integers(0, 61, (3, 2, 4), np.int32)
    return Batch(prompts, PROMPT_LENGTHS, answers, LENGTHS, WEIGHTS)


@pytest.fixture(scope="module")
def trained():
    """An objective, the trained model's parameters, and those of the reference."""
    model, params = tiny_model("gpt2")
    objective = Objective(model, IdentityPreference(tau=0.5), frozen=(("reference", model),))
    return objective, params, tiny_model("gpt2", seed=1)[1]


def log_probability(model, params, row, answer):
    """Of one answer read alone, without padding."""
    rows = batch()
    prompt = rows.prompts[row, 3 - PROMPT_LENGTHS[row] :]
    ids = rows.answers[row, answer, : LENGTHS[row, answer]]
    hidden = model.encode(params, np.concatenate([prompt, ids])[None])
    scores = np.asarray(model.logits(params, hidden)[0, len(prompt) - 1 : -1], np.float64)
    return (scores[np.arange(len(ids)), ids] - np.log(np.exp(scores).sum(axis=1))).sum()


def test_the_loss_is_that_of_the_formula(trained):
    objective, params, reference = trained
    loss, (metrics, weight) = jax.jit(objective)({**params, "reference": reference}, batch())
    gains = []
    for row in (0, 1):
        chosen, rejected = (
            log_probability(objective.model, params, row, answer)
            - log_probability(objective.model, reference, row, answer)
            for answer in (0, 1)
        )
        gains.append(chosen - rejected)
    assert float(loss) == pytest.approx(np.square(np.array(gains) - 1).mean(), rel=1e-4)
    assert float(metrics["accuracy"]) == np.mean(np.array(gains) > 0) and weight == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_model_is_trained(trained, dtype):
    objective, params, reference = trained
    objective = Objective(objective.model, objective.loss, dtype, frozen=objective.frozen)
    optimizer, _ = make_optimizer(OptimConfig(lr=1e-3, warmup=0.0), 10)
    step = make_train_step(objective, optimizer)
    state = begin(optimizer, jax.tree.map(jnp.copy, params))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch(), jax.random.key(0), {"reference": reference})
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_options_of_one_name_are_declared_alike():
    @dataclass(frozen=True)
    class Other(IdentityPreference):
        tau: float = option(0.05, "weight of the KL divergence from the reference", above=0)

    (name, kind, declared), *_ = merged_options({"ipo": IdentityPreference, "again": IdentityPreference})
    assert (name, kind, declared.default) == ("tau", float, 0.1)
    assert declared.metadata["meaning"] == "ipo, again: weight of the KL divergence from the reference"
    with pytest.raises(TypeError, match="other and ipo declare the option tau differently"):
        merged_options({"ipo": IdentityPreference, "other": Other})
