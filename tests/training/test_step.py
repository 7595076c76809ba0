"""One optimizer step: rewards of all prefixes in one pass, and what accumulation, AdamW, bf16 and dropout do."""

import dataclasses
from functools import lru_cache, partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.heads import CAUSAL_HEADS
from pargs_jax.models.one_pass import OnePass
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.objectives.partial_bt import PartialBradleyTerry
from pargs_jax.objectives.sft import SupervisedFineTuning
from pargs_jax.testing import TINY_CONFIGS, tiny_model
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_optimizer, make_train_step, round_at_random

FAMILIES = ("gpt2", "llama")
VOCABULARY = 61
PROMPT_LENGTHS = np.array([2, 1, 2], np.int32)
ANSWER_LENGTHS = np.array([[3, 1], [2, 3], [3, 3]], np.int32)


tiny = lru_cache(tiny_model)
evaluate = jax.jit(Objective.__call__, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def rewards_of(model, params, batch):
    return model.read_answers(params, batch).rewards()


@partial(jax.jit, static_argnums=0)
def last_reward(model, params, tokens):
    return model.rewards(params, model.encode(params, tokens)[:, -1])


@partial(jax.jit, static_argnums=0)
def next_token_logits(model, params, tokens):
    return model.logits(params, model.encode(params, tokens))


def real_tokens(length, seed):
    return np.random.default_rng([1, seed]).integers(0, VOCABULARY, length)


def some_batch(prompt_width=4, answer_width=5, rows=(0, 1, 2)):
    """Ragged rows of known tokens. What pads them is tokens too: nothing may look at it."""
    rng = np.random.default_rng(answer_width)
    prompts = rng.integers(0, VOCABULARY, (len(rows), prompt_width), np.int32)
    answers = rng.integers(0, VOCABULARY, (len(rows), 2, answer_width), np.int32)
    for b, row in enumerate(rows):
        length = PROMPT_LENGTHS[row]
        prompts[b, prompt_width - length :] = real_tokens(length, row)
        for a, length in enumerate(ANSWER_LENGTHS[row]):
            answers[b, a, :length] = real_tokens(length, 10 + 2 * row + a)
    rows = list(rows)
    return Batch(prompts, PROMPT_LENGTHS[rows], answers, ANSWER_LENGTHS[rows], np.ones(len(rows), np.float32))


def texts_by_length(prefixes):
    """The tokens of each (row, answer, prefix length), unpadded, in groups of one length: a compilation a group."""
    groups = {}
    for row, answer, prefix in prefixes:
        text = [
            *real_tokens(PROMPT_LENGTHS[row], row),
            *real_tokens(ANSWER_LENGTHS[row, answer], 10 + 2 * row + answer)[:prefix],
        ]
        groups.setdefault(len(text), {})[row, answer, prefix] = text
    return [(list(group), np.array(list(group.values()))) for group in groups.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_reward_of_every_prefix_run_alone(family):
    model, params = tiny(family, "reward")
    rewards = rewards_of(model, params, some_batch())
    prefixes = [(b, a, i) for b in range(3) for a in range(2) for i in range(1, ANSWER_LENGTHS[b, a] + 1)]
    seen = []
    for places, tokens in texts_by_length(prefixes):
        for (b, a, i), reward in zip(places, last_reward(model, params, tokens), strict=True):
            assert rewards[b, a, i - 1] == pytest.approx(float(reward), abs=2e-5)
            seen.append(float(reward))
    assert len(seen) == ANSWER_LENGTHS.sum() and np.std(seen) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_depend_neither_on_padding_nor_on_the_rest_of_the_batch(family):
    model, params = tiny(family, "reward")
    real = np.arange(5) < ANSWER_LENGTHS[..., None]
    rewards = np.where(real, rewards_of(model, params, some_batch()), 0)
    order = (2, 0, 0, 1)
    wide = rewards_of(model, params, some_batch(prompt_width=7, answer_width=9, rows=order))[..., :5]
    np.testing.assert_allclose(np.where(real[list(order)], wide, 0), rewards[list(order)], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_predicts_every_token_of_the_chosen_answer_from_those_before_it(family):
    model, params = tiny(family, "vocabulary")
    loss, (metrics, weight) = evaluate(Objective(model, SupervisedFineTuning()), params, some_batch())
    losses = hits = 0.0
    for places, tokens in texts_by_length([(b, 0, ANSWER_LENGTHS[b, 0]) for b in range(3)]):
        logits = np.asarray(next_token_logits(model, params, tokens), np.float64)
        for (b, _, length), text, scores in zip(places, tokens, logits, strict=True):
            first = PROMPT_LENGTHS[b]
            for position in range(first, first + length):
                before = scores[position - 1]
                losses += np.log(np.exp(before).sum()) - before[text[position]]
                hits += before.argmax() == text[position]
    count = ANSWER_LENGTHS[:, 0].sum()
    assert weight == count
    assert float(loss) == pytest.approx(losses / count, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(hits / count)


@dataclasses.dataclass(frozen=True)
class RunningMean(OnePass):
    """A causal model of three matrices, which compiles at once: a state is the mean embedding up to its token."""

    head_kind: ClassVar = CAUSAL_HEADS["reward"]

    def init(self):
        rng = np.random.default_rng(0)
        shapes = {"backbone": (VOCABULARY, 8), "reward": (8, 1), "vocabulary": (8, VOCABULARY)}
        arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        return {
            "backbone": {"embedding": arrays["backbone"]},
            "vocabulary": {"kernel": arrays["vocabulary"]},
            "head": {"linear": {"kernel": arrays["reward"]}},
        }

    def encode(self, params, tokens, start, key=None, *, prompt_width):
        slots = jnp.arange(tokens.shape[1])
        real = (slots >= start[:, None])[..., None]
        states = jnp.where(real, params["backbone"]["embedding"][tokens], 0)
        return states.cumsum(axis=1) / jnp.maximum(real.cumsum(axis=1), 1).astype(states.dtype)

    def rewards(self, params, hidden):
        return (hidden.astype(jnp.float32) @ params["head"]["linear"]["kernel"])[..., 0]

    def logits(self, params, hidden):
        return (hidden @ params["vocabulary"]["kernel"]).astype(jnp.float32)


def ragged_batch(rows=8, width=6):
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(0, VOCABULARY, (rows, 4), np.int32),
        rng.integers(1, 5, rows, np.int32),
        rng.integers(0, VOCABULARY, (rows, 2, width), np.int32),
        rng.integers(1, width + 1, (rows, 2), np.int32),
        (np.arange(rows) != 3).astype(np.float32),
    )


def state_at(number, objective, optimizer):
    params = objective.model.init()
    return TrainState(params, optimizer.init(params), jnp.asarray(number, jnp.int32))


def first_step(objective, optimizer, batch, accumulation=1):
    step = make_train_step(objective, optimizer, accumulation=accumulation)
    return jax.device_get(step(state_at(0, objective, optimizer), batch, jax.random.key(0)))


@pytest.mark.parametrize(("name", "accumulations"), [("sft", [4]), ("partial_bt", [2, 4])])
def test_accumulated_steps_equal_that_of_the_whole_batch(name, accumulations):
    objective = Objective(RunningMean(), OBJECTIVES[name]())
    batch = ragged_batch()
    # Rows of one micro-batch hold more tokens, and fewer rows that count, than those of another.
    assert len(set(batch.answer_lengths[:, 0].reshape(4, 2).sum(axis=1))) > 1
    # Plain gradient descent: Adam's first step would make all of tiny differences in the gradient.
    whole, metrics = first_step(objective, optax.sgd(0.1), batch)
    assert whole.step == 1
    for accumulation in accumulations:
        parts, part_metrics = first_step(objective, optax.sgd(0.1), batch, accumulation)
        assert parts.step == 1
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), parts.params, whole.params)
        assert part_metrics.keys() == metrics.keys()
        for metric in metrics:
            assert part_metrics[metric] == pytest.approx(metrics[metric], abs=1e-5), metric
    initial = objective.model.init()["backbone"]["embedding"]
    assert not np.allclose(whole.params["backbone"]["embedding"], initial, atol=1e-3)


def test_each_step_and_each_micro_batch_draws_its_own_prefixes():
    objective, optimizer = Objective(RunningMean(), PartialBradleyTerry(sample=1)), optax.sgd(0.0)
    twice = jax.tree.map(lambda x: x[[0, 0]], ragged_batch())._replace(answer_lengths=np.full((2, 2), 6, np.int32))
    step = make_train_step(objective, optimizer, accumulation=2)

    def losses(seed):
        key = jax.random.key(seed)
        return [round(float(step(state_at(i, objective, optimizer), twice, key)[1]["loss"]), 4) for i in range(20)]

    assert losses(0) == losses(0) != losses(1)
    # The two copies draw from six prefixes, which has 21 outcomes; were both draws the same, there would be 6.
    assert len(set(losses(0))) > 6


def test_evaluation_takes_all_prefixes_even_where_training_samples_them():
    model = RunningMean()
    sampled, full = (
        evaluate(Objective(model, PartialBradleyTerry(sample=sample)), model.init(), ragged_batch())[0]
        for sample in (1, None)
    )
    assert sampled == full


def leaves(tree):
    return {".".join(key.key for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_spares_norms_and_biases(family):
    # Only names matter, so that every array can be a scalar.
    model = CausalModel(TINY_CONFIGS[family], "reward")
    params = jax.tree.map(lambda _: jnp.ones(()), model.abstract_params())
    optimizer, _ = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5, warmup=0.0, schedule="constant"), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    spared = set()
    for name, update in leaves(updates).items():
        if update == 0:
            spared.add(name)
        else:
            assert float(update) == pytest.approx(-0.1 * 0.5)
    matrices = {name for name in leaves(params) if name.rpartition(".")[2] in ("kernel", "embedding")}
    assert spared == leaves(params).keys() - matrices
    assert all("norm" in name or name.endswith("bias") for name in spared)
    assert "backbone.layers.norm1.scale" in spared


@pytest.mark.parametrize(
    ("schedule", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_schedules_at_their_corners(schedule, halfway, end):
    learning_rate = make_optimizer(OptimConfig(lr=2.0, warmup=0.2, schedule=schedule), 100)[1]
    steps = {0: 0.0, 10: 1.0, 20: 2.0, 60: 2.0 * halfway, 100: 2.0 * end}
    assert {step: float(learning_rate(step)) for step in steps} == pytest.approx(steps, abs=1e-6)
    without_warmup = make_optimizer(OptimConfig(lr=2.0, warmup=0.0, schedule=schedule), 100)[1]
    assert float(without_warmup(0)) == 2.0
    assert float(without_warmup(100)) == pytest.approx(2.0 * end, abs=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    def updates_after(clip, *gradients):
        """Adam's update after several gradients; one alone would come out the same at any scale."""
        optimizer, _ = make_optimizer(OptimConfig(clip=clip, warmup=0.0), 10)
        params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(2)}}
        state = optimizer.init(params)
        for a, b in gradients:
            gradient = {"a": {"kernel": jnp.array(a)}, "b": {"kernel": jnp.array(b)}}
            updates, state = optimizer.update(gradient, state, params)
        return np.concatenate([updates["a"]["kernel"], updates["b"]["kernel"]])

    small, large = ([0.1, 0.2], [0.2, 0.0]), ([20.0, 10.0], [0.0, 20.0])  # norms 0.3 and 30
    clipped = updates_after(1.0, small, large)
    np.testing.assert_allclose(clipped, updates_after(0.0, small, ([2 / 3, 1 / 3], [0.0, 2 / 3])), rtol=1e-5)
    assert not np.allclose(clipped, updates_after(0.0, small, large), rtol=1e-2)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "sft"), ("llama", "partial_bt")])
def test_bfloat16_computes_about_the_same_loss(family, name):
    model, params = tiny(family, "vocabulary" if name == "sft" else "reward", std=0.04)
    objective = Objective(model, OBJECTIVES[name]())
    exact, _ = evaluate(objective, params, some_batch())
    loss, (metrics, _) = evaluate(dataclasses.replace(objective, dtype="bfloat16"), params, some_batch())
    assert loss != exact and float(loss) == pytest.approx(float(exact), rel=0.03)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype("float32")}


def test_parameters_and_optimizer_state_stay_float32_in_bfloat16():
    objective = Objective(RunningMean(), PartialBradleyTerry(), "bfloat16")
    state, metrics = first_step(objective, make_optimizer(OptimConfig(), 10)[0], ragged_batch())
    floats = [x for x in jax.tree.leaves((state, metrics)) if not np.issubdtype(x.dtype, np.integer)]
    assert {x.dtype for x in floats} == {np.dtype("float32")}
    assert np.isfinite(metrics["loss"])


def test_dropout_needs_both_a_rate_and_a_key():
    model, params = tiny("llama", "reward")

    def loss(rate, key):
        dropping = dataclasses.replace(model, config=dataclasses.replace(model.config, dropout=rate))
        return float(evaluate(Objective(dropping, PartialBradleyTerry()), params, some_batch(), key)[0])

    exact = loss(0.0, None)
    assert loss(0.0, jax.random.key(0)) == pytest.approx(exact, rel=1e-6)
    assert loss(0.3, None) == pytest.approx(exact, rel=1e-6)
    dropped = [loss(0.3, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert dropped[0] == dropped[1] != dropped[2]
    assert abs(dropped[0] - exact) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_remat_in_a_scan_gives_the_gradients_of_layers_one_by_one_for_less_memory(family):
    model, params = tiny(family, "reward")

    def compiled(remat):
        config = dataclasses.replace(model.config, remat=remat)
        shape = dataclasses.replace(model, config=config)
        objective = Objective(shape, PartialBradleyTerry(), unrolls=remat == "none")
        batch = some_batch(prompt_width=30, answer_width=30)
        return jax.jit(jax.grad(lambda params: objective(params, batch)[0])).lower(params).compile()

    plain, again = compiled("none"), compiled("layers")
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), again(params), plain(params))
    assert again.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes


def test_the_mean_of_gradients_may_be_kept_in_half():
    optimizer, _ = make_optimizer(OptimConfig(moment_dtype="bfloat16"), 10)
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    state = optimizer.init(params)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim}
    assert dtypes == {"bfloat16", "float32"}
    updates, _ = optimizer.update(params, state, params)
    assert updates["a"]["kernel"].dtype == jnp.float32


def test_the_mean_of_squares_may_be_kept_in_half_because_it_is_rounded_at_random():
    """Squares that are twice the mean: to the nearest, bfloat16 would stand still; at random, it follows float32."""
    params = {"kernel": jnp.ones((64, 64))}
    state = {}
    for dtype in ("float32", "bfloat16"):
        optimizer, _ = make_optimizer(OptimConfig(square_dtype=dtype, clip=0.0, b1=0.0), 400)
        state[dtype] = jax.jit(optimizer.init)(params)
        update = jax.jit(optimizer.update)
        for number in range(300):
            grads = {"kernel": jnp.full((64, 64), 1.0 if number < 100 else 2**0.5)}
            _, state[dtype] = update(grads, state[dtype], params)
    squares = {dtype: optax.tree.get(found, "nu")["kernel"] for dtype, found in state.items()}
    assert squares["bfloat16"].dtype == jnp.bfloat16 and squares["float32"].dtype == jnp.float32
    expected = float(squares["float32"][0, 0])
    found = np.asarray(squares["bfloat16"], np.float32)
    np.testing.assert_allclose(found.mean(), expected, rtol=2e-3)
    assert 0 < found.std() / expected < 0.05
    assert jax.tree.structure(state["float32"]) == jax.tree.structure(state["bfloat16"])


def test_rounding_at_random_hits_the_two_nearest_numbers_as_often_as_it_should():
    low, high = np.float32(1), np.float32(1 + 2**-7)  # neighbours in bfloat16
    for share in (0, 0.25, 0.9):
        x = jnp.full(20000, low + share * (high - low))
        rounded = np.asarray(round_at_random(x, jax.random.key(0)), np.float32)
        assert set(rounded) <= {low, high}
        assert (rounded == high).mean() == pytest.approx(share, abs=0.015)
