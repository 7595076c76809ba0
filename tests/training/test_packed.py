"""Packed batches give the losses, metrics and gradients of the same batches unpacked."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pargs_jax.commands.train import training_program
from pargs_jax.config import ModelConfig, TrainConfig
from pargs_jax.data.batches import Batches
from pargs_jax.data.examples import Example
from pargs_jax.data.packing import Packing
from pargs_jax.errors import InputError
from pargs_jax.models.causal import CausalModel, seen_in
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.heads import CAUSAL_HEADS
from pargs_jax.models.lora import join_params, split_params
from pargs_jax.models.one_pass import OnePass
from pargs_jax.models.preference_lora import NAMES, PreferenceLora
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.models.rotary import Rotary
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import begin, make_train_step

LONGEST = 11
WIDTH = 14  # some pairs do not fit a row and are split
LLAMA = TINY_CONFIGS["llama"]
LONGROPE = Rotary(
    kind="longrope",
    numbers=(("long_factor", (1.0,) * 4), ("original_max_position_embeddings", 32), ("short_factor", (1.0,) * 4)),
)
PREFIX_CAUSAL = PrefixCausalModel(dataclasses.replace(TINY_DEBERTA, attention="prefix_causal"))


@dataclasses.dataclass(frozen=True)
class MeanOfSeen(OnePass):
    """A causal model that compiles at once: a state is a function of the mean embedding of what its token sees."""

    head_kind: ClassVar = CAUSAL_HEADS["reward"]

    def init(self, seed=0):
        rng = np.random.default_rng(seed)
        shapes = {"backbone": (61, 8), "positions": (20, 8), "head": (8, 1), "vocabulary": (8, 61)}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def encode(self, params, tokens, start, key=None, *, prompt_width):
        slots = jnp.arange(tokens.shape[1])
        sees = (slots[:, None] >= slots) & (slots >= start[:, None])[:, None]
        return self._states(params, tokens, jnp.maximum(slots - start[:, None], 0), sees)

    def encode_packed(self, params, packed, key=None):
        return self._states(params, packed.tokens, packed.positions, seen_in(packed))

    def _states(self, params, tokens, positions, sees):
        weights = sees / jnp.maximum(sees.sum(axis=-1, keepdims=True), 1)
        return jnp.tanh(weights @ (params["backbone"][tokens] * params["positions"][positions]))

    def rewards(self, params, hidden):
        return (hidden @ params["head"])[..., 0]

    def logits(self, params, hidden):
        return hidden @ params["vocabulary"]


def batch_for(loss, packing, rows=6):
    """A batch of ragged rows, of which the last has no weight."""
    rng = np.random.default_rng(0)
    answers = loss.samples or loss.answers

    def ids(least, most):
        return rng.integers(0, 61, rng.integers(least, most + 1)).astype(np.int32)

    examples = [
        Example(
            ids(1, 6),
            tuple(ids(1, 5) for _ in range(answers)),
            rewards=None if loss.reward_range is None else tuple(rng.normal(size=answers)),
            labels=tuple(rng.uniform(size=loss.labels)) if loss.labels else None,
        )
        for _ in range(rows)
    ]
    batch = Batches(examples, rows, LONGEST, seed=0, packing=packing).batch(0)
    return batch._replace(weights=(np.arange(rows) < rows - 1).astype(np.float32))


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradient(objective, gradients, params, frozen, batch, key):
    def loss(params):
        return objective(join_params(params, frozen), batch, key, np.int32(0))

    return jax.value_and_grad(loss, has_aux=True)(params) if gradients else (loss(params), jnp.ones(()))


def check_equal(objective, params, batch, frozen=None, *, gradients=True):
    """Compares loss and metrics, and gradients where they are asked for, which take most of the compilation."""
    key = jax.random.key(0)
    packed, unpacked = (
        value_and_gradient(objective, gradients, params, frozen or {}, each, key)
        for each in (batch, batch._replace(packed=None))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), packed, unpacked)
    assert max(np.abs(x).max() for x in jax.tree.leaves(packed[1])) > 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", {}),
        ("bt", {}),
        ("partial_bt", {}),
        ("partial_bt", {"sample": 2}),
        ("arm", {}),
        ("dpo", {}),
        ("rad", {}),
        ("fudge", {}),
        ("td_lambda", {}),
        ("cd_q", {}),
        ("ctl", {"n": 3}),
        ("farma", {}),
        ("distill", {"k": 0, "teacher": "some/folder"}),
    ],
)
def test_every_objective_has_the_values_of_the_unpacked_batch(name, options):
    """With gradients for an objective of each kind of output: log-probabilities, and rewards of prefixes."""
    loss, model = OBJECTIVES[name](**options), MeanOfSeen()
    objective = Objective(model, loss, frozen=tuple((other, model) for other in loss.frozen))
    frozen = {other: model.init(seed) for seed, other in enumerate(loss.frozen, 1)}
    gradients = not options and name in ("sft", "partial_bt")
    check_equal(objective, model.init(), batch_for(loss, Packing(WIDTH)), frozen, gradients=gradients)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sft", CausalModel(TINY_CONFIGS["gpt2"])),
        ("arm", CausalModel(TINY_CONFIGS["opt"])),
        ("partial_bt", CausalModel(TINY_CONFIGS["llama"], "reward")),
        ("bt", CausalModel(dataclasses.replace(LLAMA, windows=(None, 3)), "reward")),
        ("partial_bt", PREFIX_CAUSAL),
    ],
)
def test_every_family_has_the_values_of_the_unpacked_batch(name, model):
    loss = OBJECTIVES[name]()
    packing = Packing(WIDTH, shares_prompts=model.shares_prompts)
    gradients = model == CausalModel(LLAMA, "reward")
    check_equal(Objective(model, loss), random_params(model), batch_for(loss, packing), gradients=gradients)


def test_a_teacher_scores_candidates_of_packed_texts_as_of_others():
    loss, model, teacher = OBJECTIVES["distill"](k=2, teacher="some/folder"), MeanOfSeen(), CausalModel(LLAMA, "reward")
    objective = Objective(model, loss, frozen=(("teacher", teacher), ("reference", model)))
    frozen = {"teacher": random_params(teacher), "reference": model.init(1)}
    check_equal(objective, model.init(), batch_for(loss, Packing(WIDTH)), frozen, gradients=False)


def test_each_packed_token_is_read_with_the_preferences_of_its_pair():
    loss = OBJECTIVES["parm"](beta=1.0)
    model = CausalModel(LLAMA, lora=PreferenceLora(objectives=2, rank=2))
    trained, frozen = split_params(random_params(model), NAMES)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), trained)
    check_equal(Objective(model, loss), trained, batch_for(loss, Packing(WIDTH)), frozen, gradients=False)


def test_accumulated_steps_on_packed_parts_equal_that_of_the_whole_batch_unpacked():
    model = MeanOfSeen()
    objective, optimizer = Objective(model, OBJECTIVES["partial_bt"]()), optax.sgd(0.1)
    trained, frozen = split_params(model.init(), ("head", "backbone"))

    def stepped(batch, accumulation):
        step = make_train_step(objective, optimizer, accumulation=accumulation)
        return step(begin(optimizer, jax.tree.map(np.copy, trained)), batch, jax.random.key(0), frozen)

    batch = batch_for(objective.loss, Packing(WIDTH, parts=3))
    state, metrics = stepped(batch, 3)
    expected, expected_metrics = stepped(batch._replace(packed=None), 1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state.params, expected.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), metrics, expected_metrics)


@pytest.mark.parametrize(
    ("model", "max_length", "words"),
    [
        (EncoderModel(TINY_DEBERTA), 64, "has full attention, which reads every prefix separately"),
        (
            CausalModel(
                dataclasses.replace(LLAMA, rotary=Rotary(kind="dynamic", numbers=(("factor", 2.0),))), "reward"
            ),
            65,
            "beyond 64 tokens the positions of some/folder depend on the longest text of a row .dynamic RoPE scaling",
        ),
        (
            CausalModel(dataclasses.replace(LLAMA, rotary=LONGROPE), "reward"),
            33,
            "beyond 32 tokens the positions of some/folder depend on the longest text of a row .longrope RoPE scaling",
        ),
    ],
)
def test_models_that_cannot_read_packed_texts_are_refused(model, max_length, words):
    config = TrainConfig(pack=200, max_length=max_length, model=ModelConfig(init="some/folder"))
    with pytest.raises(InputError, match=f"--pack: got 200, but .*{words}"):
        training_program(config, model, closing_id=2)
    training_program(dataclasses.replace(config, pack=0), model, closing_id=2)
