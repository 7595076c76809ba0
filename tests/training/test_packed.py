"""Packed batches give the losses, metrics and gradients of the same batches unpacked."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest

from pargs_jax.commands.train import training_program
from pargs_jax.config import ModelConfig, TrainConfig
from pargs_jax.data.batches import Batches, Example
from pargs_jax.data.packing import Packing
from pargs_jax.errors import InputError
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.lora import Lora, split_params
from pargs_jax.models.preference_lora import PreferenceLora
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.models.rotary import Rotary
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import begin, make_train_step

LONGEST = 11
WIDTH = 14  # some pairs do not fit a row and are split
FAMILIES = {
    **{
        f"{name} {head}": CausalModel(config, head)
        for name, config in TINY_CONFIGS.items()
        for head in ("vocabulary", "reward", "table")
    },
    "prefix_causal reward": PrefixCausalModel(dataclasses.replace(TINY_DEBERTA, attention="prefix_causal")),
}


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


@partial(jax.jit, static_argnums=0)
def value_and_gradient(objective, params, batch, key):
    """Of all floating-point parameters, the frozen models' included: those must be zero."""
    return jax.value_and_grad(objective, has_aux=True)(params, batch, key, np.int32(0))


def check_equal(objective, params, batch):
    key = jax.random.key(0)
    packed, unpacked = (
        value_and_gradient(objective, params, each, key) for each in (batch, batch._replace(packed=None))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), packed, unpacked)
    assert max(np.abs(x).max() for x in jax.tree.leaves(packed[1])) > 1e-3


CASES = [
    ("sft", "gpt2", {}),
    ("bt", "opt", {}),
    ("partial_bt", "llama", {}),
    ("partial_bt", "gpt2", {"sample": 2}),
    ("partial_bt", "prefix_causal", {}),
    ("arm", "opt", {}),
    ("dpo", "gpt2", {}),
    ("rad", "gpt2", {}),
    ("fudge", "llama", {}),
    ("td_lambda", "prefix_causal", {}),
    ("cd_q", "llama", {}),
    ("ctl", "gpt2", {"n": 3}),
    ("farma", "llama", {}),
    ("distill", "llama", {"k": 2, "teacher": "some"}),
]


@pytest.mark.parametrize(("name", "family", "options"), CASES)
def test_loss_metrics_and_gradients_are_those_of_the_unpacked_batch(name, family, options):
    loss = OBJECTIVES[name](**options)
    model = FAMILIES[f"{family} {loss.head}"]
    known = {"reference": FAMILIES.get(f"{family} vocabulary"), "teacher": FAMILIES["gpt2 reward"]}
    frozen = tuple((other, known[other]) for other in loss.frozen)
    params = random_params(model) | {other: random_params(of, seed=i + 1) for i, (other, of) in enumerate(frozen)}
    packing = Packing(WIDTH, shares_prompts=model.shares_prompts)
    check_equal(Objective(model, loss, frozen=frozen), params, batch_for(loss, packing))


def test_each_packed_token_is_read_with_the_preferences_of_its_pair():
    loss = OBJECTIVES["parm"]()
    additions = PreferenceLora(objectives=2, rank=2)
    model = dataclasses.replace(FAMILIES["llama vocabulary"], lora=additions)
    params = jax.tree.map(lambda x: 0.3 + 0 * x if x.ndim < 3 else x, random_params(model))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
            if path[-1].key in ("own_in", "own_mix", "own_out")
            else x
        ),
        params,
    )
    check_equal(Objective(model, loss), params, batch_for(loss, Packing(WIDTH)))


def test_accumulated_steps_on_packed_parts_equal_that_of_the_whole_batch_unpacked():
    model = dataclasses.replace(FAMILIES["llama reward"], lora=Lora(rank=2))
    objective, optimizer = Objective(model, OBJECTIVES["partial_bt"]()), optax.sgd(0.1)
    trained, frozen = split_params(random_params(model), ("head", "lora_in", "lora_out"))

    def stepped(batch, accumulation):
        step = make_train_step(objective, optimizer, accumulation=accumulation)
        return step(begin(optimizer, jax.tree.map(np.copy, trained)), batch, jax.random.key(0), frozen)

    batch = batch_for(objective.loss, Packing(WIDTH, parts=3))
    state, metrics = stepped(batch, 3)
    expected, expected_metrics = stepped(batch._replace(packed=None), 1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), state.params, expected.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), metrics, expected_metrics)


LLAMA = TINY_CONFIGS["llama"]


@pytest.mark.parametrize(
    ("model", "max_length", "words"),
    [
        (EncoderModel(TINY_DEBERTA), 64, "has full attention, which reads every prefix separately"),
        (
            CausalModel(
                dataclasses.replace(LLAMA, rotary=Rotary(kind="dynamic", numbers=(("factor", 2.0),))), "reward"
            ),
            65,
            "beyond 64 tokens the positions of some/folder depend on the longest text of a row",
        ),
    ],
)
def test_models_that_cannot_read_packed_texts_are_refused(model, max_length, words):
    config = TrainConfig(pack=200, max_length=max_length, model=ModelConfig(init="some/folder"))
    with pytest.raises(InputError, match=f"--pack: got 200, but .*{words}"):
        training_program(config, model, closing_id=2)
    training_program(dataclasses.replace(config, pack=0), model, closing_id=2)
