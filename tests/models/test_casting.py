"""Matrices that layers convert for themselves: the numbers that `astype` gives, and the same training step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pargs_jax.data.batches import Batch
from pargs_jax.models.casting import StoredMatrix, converted, store_matrices
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.layers import Remat
from pargs_jax.objectives import OBJECTIVES
from pargs_jax.testing import TINY_CONFIGS, random_params
from pargs_jax.training.objective import Objective
from pargs_jax.training.step import TrainState, make_train_step


def test_numbers_are_rounded_as_astype_rounds_them():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7F7FFFFF, 0x3F808000, 0x3F818000], np.uint32)
    numbers = jnp.asarray(np.concatenate([bits, special]).view(np.float32))
    found = converted(StoredMatrix(numbers, jnp.zeros(numbers.shape, jnp.bfloat16)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), numbers.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_a_step_is_that_of_a_converted_copy(remat: Remat, monkeypatch):
    config = dataclasses.replace(TINY_CONFIGS["llama"], remat=remat)
    model = CausalModel(config, "reward")
    rng = np.random.default_rng(0)
    batch = Batch(
        rng.integers(0, 61, (4, 3)), rng.integers(1, 4, 4), rng.integers(0, 61, (4, 2, 5)), rng.integers(1, 6, (4, 2)),
        np.ones(4, np.float32),
    )  # fmt: skip
    optimizer = optax.sgd(1.0)
    objective = Objective(model, OBJECTIVES["partial_bt"](), dtype="bfloat16")
    assert objective.converts_by_layer
    one_by_one = dataclasses.replace(objective, model=dataclasses.replace(model, unrolled=True))
    assert not one_by_one.converts_by_layer and not dataclasses.replace(objective, dtype="float32").converts_by_layer

    def stepped(accumulation: int) -> TrainState:
        params = random_params(model, std=0.1)
        state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        return make_train_step(objective, optimizer, accumulation=accumulation)(state, batch, jax.random.key(0))[0]

    found = [stepped(accumulation) for accumulation in (1, 2)]
    assert any(isinstance(x, StoredMatrix) for x in jax.tree.leaves(
        store_matrices(found[0].params), is_leaf=lambda x: isinstance(x, StoredMatrix)
    ))  # fmt: skip
    monkeypatch.setattr(Objective, "converts_by_layer", False)
    for steps, accumulation in zip(found, (1, 2), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), steps.params, stepped(accumulation).params)
