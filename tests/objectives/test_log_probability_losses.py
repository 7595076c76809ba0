"""Objectives on log-probabilities of whole answers: losses and gradients of tiny models are those of torch."""

import jax
import numpy as np
import pytest

from pargs_jax.data.batches import Batch
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import save_model
from pargs_jax.models.weights import export_tensors
from pargs_jax.objectives.arm import AutoregressiveReward
from pargs_jax.objectives.dpo import DirectPreference
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
