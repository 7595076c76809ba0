"""Objectives on log-probabilities of whole answers: losses and gradients of tiny models are those of torch."""

import dataclasses

import jax
import numpy as np
import pytest

from pargs_jax.data.batches import Batch
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import save_model
from pargs_jax.models.lora import join_params, split_params
from pargs_jax.models.preference_lora import NAMES, PreferenceLora, draw_additions
from pargs_jax.models.weights import export_tensors
from pargs_jax.objectives.arm import AutoregressiveReward
from pargs_jax.objectives.bradley_terry import labelled_bradley_terry
from pargs_jax.objectives.dpo import DirectPreference
from pargs_jax.objectives.parm import PreferenceAwareReward
from pargs_jax.testing import tiny_model
from pargs_jax.training.objective import Objective

PROMPT_LENGTHS = np.array([2, 3, 1], np.int32)
LENGTHS = np.array([[3, 1], [2, 4], [4, 4]], np.int32)
WEIGHTS = np.array([1, 0.5, 0], np.float32)
LOSSES = (AutoregressiveReward(), AutoregressiveReward(beta=0.05), DirectPreference())


def batch():
    """Ragged rows, of which the last is filler. What pads them is tokens too."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(0, 61, (3, 3), np.int32), rng.integers(0, 61, (3, 2, 4), np.int32)
    return Batch(prompts, PROMPT_LENGTHS, answers, LENGTHS, WEIGHTS)


def test_only_a_loss_that_starts_at_chance_has_a_limit():
    """Without a reference, the first losses depend on the answers' lengths; a fixed limit ended runs that were well."""
    assert DirectPreference().chance(61) == pytest.approx(np.log(2))
    assert AutoregressiveReward().chance(61) == PreferenceAwareReward().chance(61) == np.inf


def torch_model(folder, seed):
    """The tiny model of a seed as transformers has it."""
    transformers = pytest.importorskip("transformers")
    save_model(folder, *tiny_model("llama", seed=seed))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def log_probability(torch, model, row, answer):
    """Of one answer read alone, without padding."""
    rows = batch()
    ids = rows.answers[row, answer, : LENGTHS[row, answer]]
    text = torch.tensor(np.concatenate([rows.prompts[row, 3 - PROMPT_LENGTHS[row] :], ids])).long()
    scores = model(text[None]).logits[0, len(text) - len(ids) - 1 : -1].log_softmax(-1)
    return scores[torch.arange(len(ids)), text[-len(ids) :]].sum()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_loss_and_gradient_are_those_of_torch(loss, tmp_path):
    torch = pytest.importorskip("torch")
    reference = torch_model(tmp_path / "reference", seed=1) if loss.frozen else None
    theirs = torch_model(tmp_path / "trained", seed=0)
    beta = loss.usual_beta if loss.beta is None else loss.beta
    gains = []
    for row in (0, 1):
        chosen, rejected = (log_probability(torch, theirs, row, answer) for answer in (0, 1))
        if reference is not None:  # TRL: the difference of the two models' log-ratios of chosen and rejected
            with torch.no_grad():
                ref_chosen, ref_rejected = (log_probability(torch, reference, row, answer) for answer in (0, 1))
            gains.append(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))
        else:
            gains.append(beta * (chosen - rejected))
    losses = -torch.nn.functional.logsigmoid(torch.stack(gains))
    expected = (losses * torch.tensor(WEIGHTS[:2])).sum() / WEIGHTS.sum()
    expected.backward()

    model, params = tiny_model("llama")
    frozen = {"reference": tiny_model("llama", seed=1)[1]} if loss.frozen else {}
    objective = Objective(model, loss, frozen=tuple((name, model) for name in frozen))
    compute = jax.jit(jax.value_and_grad(lambda params: objective({**params, **frozen}, batch()), has_aux=True))
    (value, (metrics, weight)), gradient = compute(params)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5) and weight == 1.5
    hits = np.array([float(gain > 0) for gain in gains])
    assert float(metrics["accuracy"]) == pytest.approx((hits @ WEIGHTS[:2]) / 1.5)
    ours = dict(export_tensors(model, FAMILIES["llama"], gradient))
    named = {name: part.grad.numpy() for name, part in theirs.named_parameters()}
    assert ours.keys() == named.keys()
    for name, part in named.items():
        np.testing.assert_allclose(ours[name], part, atol=1e-5 * max(1.0, np.abs(part).max()), err_msg=name)
    assert max(np.abs(part).max() for part in named.values()) > 1e-2


# PARM: a model conditioned on the preference vector of each pair.

LABELS = np.array([[1, 0, 1], [0, 0.25, 1], [1, 1, 1]], np.float32)
PARM = PreferenceAwareReward(beta=0.5, labels=3)


def conditioned():
    """A tiny model with additions that are not zero, and its ordinary parameters."""
    model, params = tiny_model("llama")
    adapted = dataclasses.replace(model, lora=PreferenceLora(**PARM.preference_lora))
    drawn = draw_additions(adapted.abstract_params(), jax.random.key(3))
    rng = np.random.default_rng(4)
    drawn = jax.tree.map(lambda x: x if x.any() else 0.3 * rng.standard_normal(x.shape, np.float32), drawn)
    return adapted, model, params, drawn


def merged(params, additions, vector):
    """The ordinary parameters of the model for one preference vector."""
    layers = dict(params["backbone"]["layers"])
    for name in ("query", "key", "value"):
        own = additions["backbone"]["layers"][name]["addition"]
        mix = sum(a * own["own_mix"][:, i] for i, a in enumerate(vector))
        added = own["shared_in"] @ own["shared_mix"] @ own["shared_out"] + own["own_in"] @ mix @ own["own_out"]
        layers[name] = {**layers[name], "kernel": layers[name]["kernel"] + 8 / 4 * added}
    return {**params, "backbone": {**params["backbone"], "layers": layers}}


def test_the_loss_is_the_weighted_sum_of_each_objectives_bradley_terry():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=3).astype(np.float32)
    preferences = rng.dirichlet([0.5] * 3, size=3).astype(np.float32)

    def loss(x):
        return labelled_bradley_terry(x, LABELS, preferences, WEIGHTS)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(differences)
    losses, slopes, hits = np.zeros(3), np.zeros(3), np.zeros(3)
    for row in range(3):
        chance = 1 / (1 + np.exp(-np.float64(differences[row])))
        for a, label in zip(preferences[row], LABELS[row], strict=True):
            losses[row] -= a * (label * np.log(chance) + (1 - label) * np.log(1 - chance))
            slopes[row] += a * (chance - label)
            hits[row] += a * (label if chance > 0.5 else 1 - label)
    assert float(value) == pytest.approx(losses @ WEIGHTS / WEIGHTS.sum(), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(hits @ WEIGHTS / WEIGHTS.sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, slopes * WEIGHTS / WEIGHTS.sum(), atol=1e-6)


def test_loss_and_gradient_are_those_of_torch_models_merged_for_each_row(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapted, plain, params, drawn = conditioned()
    rows = batch()._replace(labels=LABELS)
    vectors = PARM.preferences(rows, None)
    assert vectors.shape == (3, 3) and np.allclose(vectors.sum(axis=1), 1)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01

    expected, merged_gradients = 0.0, []
    for row in (0, 1):
        save_model(tmp_path / str(row), plain, merged(params, drawn, vectors[row]))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / str(row), attn_implementation="eager"
        ).eval()
        chosen, rejected = (log_probability(torch, theirs, row, answer) for answer in (0, 1))
        gain = PARM.factor * (chosen - rejected)
        loss = 0.0
        for a, label in zip(np.asarray(vectors[row]).tolist(), LABELS[row].tolist(), strict=True):
            wins, loses = torch.nn.functional.logsigmoid(gain), torch.nn.functional.logsigmoid(-gain)
            loss = loss - a * (label * wins + (1 - label) * loses)
        (loss * WEIGHTS[row] / WEIGHTS.sum()).backward()
        expected += loss.item() * WEIGHTS[row] / WEIGHTS.sum()
        merged_gradients.append({name: part.grad.numpy() for name, part in theirs.named_parameters()})

    objective = Objective(adapted, PARM)
    trained, given = split_params(drawn, NAMES)
    frozen = join_params(params, given)
    compute = jax.jit(jax.value_and_grad(lambda own: objective(join_params(own, frozen), rows), has_aux=True))
    (value, (_, weight)), gradient = compute(trained)
    assert float(value) == pytest.approx(expected, rel=1e-5) and weight == 1.5

    def dot(own):
        """By the chain rule, its gradient is that of the loss: each row's merged matrices times their gradients."""
        total = 0.0
        for row, slopes in enumerate(merged_gradients):
            layers = merged(params, own, vectors[row])["backbone"]["layers"]
            for name in ("query", "key", "value"):
                kernels = layers[name]["kernel"]
                for layer in range(2):
                    total += (kernels[layer] * slopes[f"model.layers.{layer}.self_attn.{name[0]}_proj.weight"].T).sum()
        return total

    chained = jax.grad(dot)(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, chained)
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-2


def test_each_step_draws_new_vectors_and_an_evaluation_the_same():
    rows = batch()._replace(labels=LABELS)
    first, second = (np.asarray(PARM.preferences(rows, jax.random.key(seed))) for seed in (0, 1))
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(PARM.preferences(rows, None), PARM.preferences(rows, None))
    many = rows._replace(weights=np.ones(4000, np.float32))
    drawn = np.asarray(PARM.preferences(many, jax.random.key(0)))
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / 3, atol=0.03)
    # A Dirichlet(c, c, c) has the variance (1/3)(2/3) / (3c + 1) in each number.
    np.testing.assert_allclose(drawn.var(axis=0), 2 / 9 / 2.5, atol=0.01)
