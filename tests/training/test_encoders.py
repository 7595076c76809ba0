"""Encoders trained on all prefixes: every prefix is read as if it were alone, however the work is cut."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.data.batches import Batch, Batches
from pargs_jax.data.examples import tokenise
from pargs_jax.data.preferences import Preference
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.objectives.bradley_terry import bradley_terry, choose_prefixes, partial_bradley_terry
from pargs_jax.objectives.partial_bt import PartialBradleyTerry
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_tokenizer
from pargs_jax.training.objective import Objective

SEP = 2
PROMPT_LENGTHS = np.array([3, 6], np.int32)
LENGTHS = np.array([[7, 4], [2, 10]], np.int32)
WIDTH = 11
MODEL = EncoderModel(TINY_DEBERTA)
answer_rewards = jax.jit(EncoderModel.answer_rewards, static_argnums=0)
evaluate = jax.jit(Objective.__call__, static_argnums=0)


def objective_of(options, chunk):
    options = dict(options)
    loss = OBJECTIVES[options.pop("name", "partial_bt")](**options)
    return Objective(MODEL, loss, closing_id=SEP, chunk=chunk)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL, seed=3)


def batch():
    """Ragged pairs, of which three answers are finished and one was cut; what pads them is tokens too."""
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(3, 61, (2, 7), np.int32), rng.integers(3, 61, (2, 2, WIDTH), np.int32)
    prompts[:, -1] = SEP
    for row, answer in ((0, 0), (0, 1), (1, 1)):
        answers[row, answer, LENGTHS[row, answer] - 1] = SEP
    return Batch(prompts, PROMPT_LENGTHS, answers, LENGTHS, np.ones(2, np.float32))


@pytest.fixture(scope="module")
def alone(params):
    """Rewards of all prefixes, [2 2 R], each a text of its own in a place of its own."""
    rows = batch()
    rewards = np.zeros((2, 2, WIDTH), np.float32)
    for row in range(2):
        prompt = np.zeros((1, 9), np.int32)
        prompt[0, 9 - PROMPT_LENGTHS[row] :] = rows.prompts[row, 7 - PROMPT_LENGTHS[row] :]
        for answer in range(2):
            for prefix in range(1, WIDTH + 1):
                count = min(prefix, LENGTHS[row, answer])
                text = np.zeros((1, 20), np.int32)
                text[0, :count] = rows.answers[row, answer, :count]
                lengths = PROMPT_LENGTHS[row : row + 1], np.array([count], np.int32)
                rewards[row, answer, prefix - 1] = answer_rewards(
                    MODEL, params, prompt, lengths[0], text, lengths[1], SEP
                )[0]
    assert np.std(rewards) > 0.01
    return rewards


@pytest.mark.parametrize(("chunk", "descending"), [(1, False), (4, True), (100, True)])
def test_masked_prefixes_equal_the_same_prefixes_alone(params, alone, chunk, descending):
    prefixes = choose_prefixes(jnp.asarray(LENGTHS), WIDTH)

    @jax.jit
    def run(params, batch, lengths):
        return MODEL.read_answers(params, batch, closing_id=SEP, chunk=chunk).rewards_at(lengths, descending=descending)

    pairs = run(params, batch(), prefixes.lengths)
    for row in range(2):
        for n, prefix in enumerate(np.asarray(prefixes.lengths)[row]):
            np.testing.assert_allclose(pairs[row, n], alone[row, :, prefix - 1], atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3, "margin": 0.3},
        {"stride": 4, "sample": 1},
        {"prefix_weights": "linear", "minimum_length": 3, "centring": 0.1},
        {"name": "bt", "margin": 0.3},
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_prefixes_rewards(params, alone, options):
    objective = objective_of(options, chunk=4)
    loss, (metrics, weight) = evaluate(objective, params, batch())
    arrays = jnp.asarray(alone), jnp.asarray(LENGTHS)
    # Without a key nothing is drawn, here and there.
    options = {name: value for name, value in options.items() if name not in ("name", "sample")}
    reference = bradley_terry if objective.loss.name == "bt" else partial_bradley_terry
    expected, expected_metrics = reference(*arrays, **options)
    assert float(loss) == pytest.approx(float(expected), abs=2e-5)
    assert weight == 2
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        assert float(metrics[name]) == pytest.approx(float(value), abs=2e-5), name


FULL = {"accuracy", "accuracy_100", "margin", "reward_mean", "reward_min", "reward_max"}


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({}, FULL | {f"accuracy_{percent}" for percent in (10, 25, 50, 75)}),
        ({"stride": 3}, FULL),
        ({"minimum_length": 2}, FULL),
        ({"sample": 2}, set()),
        ({"name": "bt"}, FULL),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_a_training_step_reports_what_it_has_read(params, alone, options, reported):
    objective = objective_of(options, chunk=4)
    _, (metrics, _) = evaluate(objective, params, batch(), jax.random.key(0))
    _, expected = bradley_terry(jnp.asarray(alone), jnp.asarray(LENGTHS))
    assert metrics.keys() == reported
    for name in reported:
        assert float(metrics[name]) == pytest.approx(float(expected[name]), abs=2e-5), name


def test_gradients_do_not_depend_on_the_chunks(params):
    def gradient(chunk):
        objective = objective_of({"stride": 5}, chunk)
        return jax.jit(jax.grad(lambda params: objective(params, batch())[0]))(params)

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradient(1), gradient(3))


def test_a_sample_reads_only_the_prefixes_that_it_draws(params):
    objective = objective_of({"sample": 2}, chunk=2)
    assert np.isfinite(evaluate(objective, params, batch(), jax.random.key(0))[0])
    full = objective_of({}, chunk=2)

    def operations(objective):
        compiled = evaluate.lower(objective, params, batch(), jax.random.key(0)).compile()
        return compiled.cost_analysis()["flops"]

    assert operations(objective) < operations(full)


def test_prefix_causal_trains_in_one_pass_like_a_causal_model(params):
    model = PrefixCausalModel(dataclasses.replace(TINY_DEBERTA, attention="prefix_causal"))
    loss, (metrics, _) = evaluate(Objective(model, PartialBradleyTerry()), params, batch())
    rows = batch()
    texts = np.concatenate([np.repeat(rows.prompts, 2, axis=0), rows.answers.reshape(4, WIDTH)], axis=1)
    start = np.repeat(7 - PROMPT_LENGTHS, 2)
    rewards = model.rewards(params, model.encode(params, texts, start, prompt_width=7))[:, 7:]
    expected, _ = partial_bradley_terry(rewards.reshape(2, 2, WIDTH), jnp.asarray(LENGTHS))
    assert float(loss) == pytest.approx(float(expected), abs=2e-5)
    assert 0 <= metrics["accuracy"] <= 1


def test_prefixes_can_end_at_another_tokenizers_tokens(params):
    """With the same tokenizer on both sides, they are the answers' own prefixes."""
    tokenizer = tiny_tokenizer()
    model = EncoderModel(dataclasses.replace(TINY_DEBERTA, vocab_size=tokenizer.vocab_size))
    params = random_params(model)
    rows = [
        Preference("0", "Customer: Hi.\nAgent:", " I am sorry, Eva.", " No."),
        Preference("1", "", "It is on its way.", "Bye"),
    ]
    plain, _ = tokenise(rows, tokenizer, 40)
    at_tokens, _ = tokenise(rows, tokenizer, 40, prefix_tokenizer=tokenizer)
    for example, other in zip(plain, at_tokens, strict=True):
        for answer, prefixes in zip(example.answers, other.prefixes, strict=True):
            assert len(prefixes) == len(answer)
            np.testing.assert_array_equal(prefixes[-1], answer)
    objective = Objective(model, PartialBradleyTerry(), closing_id=tokenizer.eos_id)
    losses = [
        evaluate(objective, params, next(Batches(examples, 2, 40, seed=0).evaluation()))[0]
        for examples in (plain, at_tokens)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-4)
