"""Four devices train as one does: losses, parameters, and where things lie."""

import dataclasses
from functools import lru_cache

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pargs_jax.config import OptimConfig
from pargs_jax.data.batches import Batch, Batches
from pargs_jax.data.examples import Example
from pargs_jax.data.packing import Packing
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.lora import NAMES as LORA_NAMES
from pargs_jax.models.lora import Lora, draw_lora, join_params, split_params
from pargs_jax.models.preference_lora import NAMES, PreferenceLora, draw_additions
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.objectives.ctl import ContrastiveTwist
from pargs_jax.objectives.distill import Distillation
from pargs_jax.objectives.farma import FasterReward
from pargs_jax.objectives.parm import PreferenceAwareReward
from pargs_jax.objectives.partial_bt import PartialBradleyTerry
from pargs_jax.objectives.sft import SupervisedFineTuning
from pargs_jax.sharding import map_paths, place_params, place_rows, shardings_of
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import begin, make_optimizer, make_train_step

MESHES = ("cpu-4,data=4", "cpu-4", "cpu-4,tensor=4", "cpu-4,data=2,tensor=2")
MODELS = {
    # Mistral's arrays are those of Llama.
    **{family: CausalModel(config, "reward") for family, config in TINY_CONFIGS.items() if family != "mistral"},
    "deberta": EncoderModel(TINY_DEBERTA),
    "prefix_causal": PrefixCausalModel(dataclasses.replace(TINY_DEBERTA, attention="prefix_causal")),
    "language model": CausalModel(TINY_CONFIGS["gpt2"], "vocabulary"),
}
STEPS = 3


def objective_of(model):
    loss = SupervisedFineTuning() if model.head == "vocabulary" else PartialBradleyTerry(sample=2)
    return Objective(model, loss, closing_id=2, chunk=1)


def some_batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, (8, 2)).astype(np.int32)
    tokens = (rng.integers(0, 61, shape, np.int32) for shape in ((8, 6), (8, 2, 4)))
    prompts, answers = tokens
    return Batch(prompts, rng.integers(1, 7, 8).astype(np.int32), answers, lengths, np.ones(8, np.float32))


def packed_batch(shards):
    rng = np.random.default_rng(0)

    def ids(most):
        return rng.integers(0, 61, rng.integers(1, most + 1)).astype(np.int32)

    examples = [Example(ids(6), (ids(4), ids(4))) for _ in range(8)]
    return Batches(examples, 8, 10, seed=0, packing=Packing(16, parts=2, shards=shards)).batch(0)


def trained(name, mesh, batch=None, **options):
    """Losses of a few steps, and the state after them, of a step that is made as `train` makes it."""
    batch = some_batch() if batch is None else batch
    model = dataclasses.replace(MODELS[name], **options)
    params, frozen = random_params(model), {}
    # A key's bias has no gradient but rounding, which Adam would blow up if its epsilon were smaller.
    optimizer, _ = make_optimizer(OptimConfig(lr=1e-2, weight_decay=0.1, warmup=0.0, eps=1e-3), 10)
    with jax.set_mesh(make_mesh(mesh, "train")):
        mesh = jax.sharding.get_mesh()
        params = place_params(params)
        if model.lora:
            _, frozen = split_params(params, LORA_NAMES)
            params = place_params(draw_lora(model.abstract_params(), jax.random.key(0)))
            if model.head_kind.may_be_new:
                head, frozen = split_params(frozen, ("head",))
                params = join_params(params, head)
        state = begin(optimizer, params)
        step = make_train_step(objective_of(model), optimizer, accumulation=2, places=shardings_of(state))
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, place_rows(mesh, batch), jax.random.key(0), frozen)
            losses.append(float(metrics["loss"]))
    return losses, state


on_mesh = lru_cache(lambda name, mesh: trained(name, mesh))


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), jax.device_get(one), jax.device_get(other))


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama", mesh) for mesh in MESHES] + [(name, "cpu-4,fsdp=2,tensor=2") for name in MODELS]
)
def test_four_devices_equal_one(name, mesh):
    losses, state = on_mesh(name, mesh)
    expected_losses, expected = on_mesh(name, "cpu-1")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    close(state.params, expected.params)
    assert np.ptp(losses) > 1e-4


def test_packed_rows_on_four_devices_equal_those_on_one():
    losses, state = trained("llama", "cpu-4,data=2,fsdp=2", packed_batch(shards=4))
    expected_losses, expected = trained("llama", "cpu-1", packed_batch(shards=1))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    close(state.params, expected.params)


def test_moments_are_sharded_like_their_parameters():
    _, state = on_mesh("llama", "cpu-4,fsdp=2,tensor=2")
    places = shardings_of(state.params)
    assert places["backbone"]["layers"]["query"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    moments = [part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))]
    found = [shardings_of(part) for part in moments if isinstance(part, dict)]
    assert len(found) == 2
    assert all(place == places for place in found)


def test_the_padding_of_a_vocabulary_stays_zero():
    _, state = on_mesh("language model", "cpu-4,fsdp=2,tensor=2")
    table = np.asarray(state.params["backbone"]["embed"]["embedding"])
    assert table.shape == (128, 32)
    assert not table[61:].any()
    assert table[:61].any(axis=1).all()


def test_only_additions_and_the_head_are_trained():
    lora = Lora(rank=2, layers="query|down")
    losses, state = trained("llama", "cpu-4,fsdp=2,tensor=2", lora=lora)
    expected_losses, expected = trained("llama", "cpu-1", lora=lora)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    close(state.params, expected.params)
    paths = set()
    map_paths(lambda path, _: paths.add(path), state.params)
    additions = {f"backbone.layers.{layer}.lora_{end}" for layer in ("query", "down") for end in ("in", "out")}
    assert paths == additions | {"head.linear.kernel"}


@lru_cache
def trained_outside(name, layers, mesh):
    return trained(name, mesh, lora=Lora(rank=2, layers=layers), head="vocabulary")


@pytest.mark.parametrize("mesh", ["cpu-4,fsdp=2,tensor=2", "cpu-4,tensor=4"])
@pytest.mark.parametrize(
    ("name", "layers", "outside"),
    [("llama", "query|embed|head", ("backbone.embed", "head.linear")), ("gpt2", "embed", ("backbone.embed",))],
)
def test_additions_to_embeddings_and_head_are_trained_alike(name, layers, outside, mesh):
    """GPT-2's table is its head too. Vocabularies are padded, and the padding stays zero."""
    losses, state = trained_outside(name, layers, mesh)
    expected_losses, expected = trained_outside(name, layers, "cpu-1")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    close(state.params, expected.params)
    assert np.ptp(losses) > 1e-4
    arrays = {}
    map_paths(lambda path, x: arrays.update({path: np.asarray(x)}), state.params)
    assert {path.rpartition(".")[0] for path in arrays if "layers" not in path} == set(outside)
    table = arrays["backbone.embed.lora_in"]
    assert table.shape == (128, 2) and table[:61].any() and not table[61:].any()
    if "head.linear" in outside:
        assert not arrays["head.linear.lora_out"][:, 61:].any() and arrays["head.linear.lora_out"].any()
    spec = shardings_of(state.params)["backbone"]["embed"]["lora_in"].spec
    assert spec == PartitionSpec("tensor", None)


LOSSES = {
    "parm": PreferenceAwareReward(beta=0.5),
    "farma": FasterReward(phase_steps=1),
    "distill": Distillation(teacher="a folder", k=3),
    "ctl": ContrastiveTwist(n=2),
}


def trained_with(loss, mesh):
    """As `trained`, with a loss that needs more than a model and tokens."""
    lora = PreferenceLora(**loss.preference_lora) if loss.preference_lora else None
    model = CausalModel(TINY_CONFIGS["llama"], loss.head)
    params, others = random_params(model), {"reference": model, "teacher": MODELS["gpt2"]}
    adapted = dataclasses.replace(model, lora=lora)
    batch = some_batch()._replace(rewards=np.arange(16, dtype=np.float32).reshape(8, 2) % 5)
    batch = batch._replace(labels=np.arange(16, dtype=np.float32).reshape(8, 2) % 3 / 2)
    if loss.answers == 1 and not loss.samples:
        batch = batch._replace(answers=batch.answers[:, :1], answer_lengths=batch.answer_lengths[:, :1])
    optimizer, _ = make_optimizer(OptimConfig(lr=1e-2, warmup=0.0, eps=1e-3), 10)
    with jax.set_mesh(make_mesh(mesh, "train")):
        mesh = jax.sharding.get_mesh()
        params = place_params(params)
        frozen = {name: place_params(random_params(others[name], seed=1)) for name in loss.frozen}
        if lora:
            additions = jax.tree.map(np.asarray, draw_additions(adapted.abstract_params(), jax.random.key(0)))
            drawn, given = split_params(place_params(additions), NAMES)
            params, frozen = drawn, join_params(params, given)
        state = begin(optimizer, params)
        objective = Objective(adapted, loss, frozen=tuple((name, others[name]) for name in loss.frozen))
        step = make_train_step(objective, optimizer, places=shardings_of(state))
        losses = []
        for _ in range(STEPS):
            state, metrics = step(state, place_rows(mesh, batch), jax.random.key(0), frozen)
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("name", LOSSES)
def test_four_devices_equal_one_for_losses_with_more_inputs(name):
    (losses, state), (expected_losses, expected) = (
        trained_with(LOSSES[name], mesh) for mesh in ("cpu-4,fsdp=2,tensor=2", "cpu-1")
    )
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    close(state.params, expected.params)
    assert np.ptp(losses) > 1e-4
