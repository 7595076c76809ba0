"""Distillation: what the teacher says of each candidate is what it says of each text alone; the loss is torch's."""

import jax
import numpy as np
import optax
import pytest

from pargs_jax.data.batches import Batch
from pargs_jax.models.families import FAMILIES
from pargs_jax.models.hf import save_model
from pargs_jax.models.weights import export_tensors
from pargs_jax.objectives.distill import Distillation
from pargs_jax.testing import TINY_CONFIGS, tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_train_step

PROMPT_LENGTHS = np.array([2, 3, 1, 1], np.int32)
LENGTHS = np.array([3, 1, 4, 2], np.int32)
WEIGHTS = np.array([1, 0.5, 1, 0], np.float32)
K = 3


def batch():
    """Ragged rows, of which the last is filler. What pads them is tokens too."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(0, 61, (4, 3), np.int32), rng.integers(0, 61, (4, 1, 4), np.int32)
    return Batch(prompts, PROMPT_LENGTHS, answers, LENGTHS[:, None], WEIGHTS)


def text(row, count):
    """A row's prompt and the first tokens of its answer, without padding."""
    rows = batch()
    return np.concatenate([rows.prompts[row, 3 - PROMPT_LENGTHS[row] :], rows.answers[row, 0, :count]])


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_rewards_of_next_tokens_are_those_of_each_text_read_alone(family):
    model, params = tiny_model(family, "reward", seed=1)
    candidates = np.random.default_rng(1).integers(0, 61, (4, 1, 4, 2), np.int32)
    compute = jax.jit(lambda params, rows: model.read_answers(params, rows).rewards_of_next(candidates))
    found = compute(params, batch())
    alone = jax.jit(lambda tokens: model.rewards(params, model.encode(params, tokens)[:, -1]))
    for row in range(4):
        for place in range(LENGTHS[row]):
            for k in range(2):
                whole = [*text(row, place), candidates[row, 0, place, k]]
                assert found[row, 0, place, k] == pytest.approx(float(alone(np.array([whole]))[0]), abs=1e-5)


def objective_of(loss):
    table, params = tiny_model("llama", "table")
    teacher, teacher_params = tiny_model("gpt2", "reward", seed=1)
    models = {"teacher": (teacher, teacher_params), "reference": tiny_model("llama", "table", seed=2)}
    frozen = {name: models[name] for name in loss.frozen}
    objective = Objective(table, loss, frozen=tuple((name, model) for name, (model, _) in frozen.items()))
    return objective, params, {name: own for name, (_, own) in frozen.items()}


@pytest.mark.parametrize("k", [0, K])
def test_loss_and_gradient_are_those_of_torch(k, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def torch_model(kind, *arguments, **options):
        folder = tmp_path / f"{kind}{options}"
        save_model(folder, *tiny_model(*arguments, **options))
        return getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()

    theirs = torch_model("AutoModelForCausalLM", "llama")
    lm = torch_model("AutoModelForCausalLM", "llama", seed=2)
    judge = torch_model("AutoModelForSequenceClassification", "gpt2", "reward", seed=1)
    losses, hits, weights = [], [], []
    for row in range(3):
        for place in range(LENGTHS[row]):
            before = torch.tensor(text(row, place)).long()
            with torch.no_grad():
                likeliest = lm(before[None]).logits[0, -1].topk(K).indices
                tokens = likeliest if k else torch.tensor(text(row, place + 1)).long()[-1:]
                targets = torch.stack([judge(torch.cat([before, v[None]])[None]).logits[0, 0] for v in tokens])
            rewards = theirs(before[None]).logits[0, -1, tokens]
            losses.append(((rewards - targets) ** 2).mean() / 2)
            hits.append(float(rewards.argmax() == targets.argmax()))
            weights.append(WEIGHTS[row])
    weights = torch.tensor(weights)
    expected = (torch.stack(losses) * weights).sum() / weights.sum()
    expected.backward()

    objective, params, frozen = objective_of(Distillation(teacher="a folder", k=k))
    compute = jax.jit(jax.value_and_grad(lambda params: objective({**params, **frozen}, batch()), has_aux=True))
    (value, (metrics, weight)), gradient = compute(params)
    assert float(value) == pytest.approx(expected.item(), rel=1e-4) and weight == 7.5
    assert float(metrics["squared_error"]) == pytest.approx(2 * expected.item(), rel=1e-4)
    assert ("accuracy" in metrics) == (k > 1) == objective.loss.has_accuracy
    if k:
        assert float(metrics["accuracy"]) == pytest.approx(float(np.dot(hits, weights) / weights.sum()), rel=1e-5)
    ours = dict(export_tensors(objective.model, FAMILIES["llama"], gradient))
    for name, part in theirs.named_parameters():
        np.testing.assert_allclose(ours[name], part.grad, atol=1e-5 * max(1.0, part.grad.abs().max()), err_msg=name)
    assert max(np.abs(part).max() for part in ours.values()) > 1e-2


def test_micro_batches_make_the_step_of_the_whole_batch():
    objective, params, frozen = objective_of(Distillation(teacher="a folder", k=K))
    optimizer = optax.sgd(0.1)

    def step(accumulation):
        state = TrainState(jax.tree.map(np.copy, params), optimizer.init(params), np.zeros((), np.int32))
        return make_train_step(objective, optimizer, accumulation=accumulation)(
            state, batch(), jax.random.key(0), frozen
        )

    (whole, metrics), (parts, part_metrics) = step(1), step(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts.params)
    for name, value in metrics.items():
        assert float(part_metrics[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
