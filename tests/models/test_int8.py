"""Matrices in int8: rounded per output channel when a checkpoint is read, and exact from there on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.int8 import MATRIX, SCALE, quantise
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params

TEXTS = jnp.arange(24).reshape(2, 12)


def rounded(params):
    """The float parameters that int8 ones stand for."""
    if not isinstance(params, dict):
        return params
    params = {name: rounded(part) for name, part in params.items()}
    if SCALE in params:
        scale = params.pop(SCALE)
        params[MATRIX] = params[MATRIX].astype(scale.dtype) * scale[..., None, :]
    return params


def outputs(model, params):
    if isinstance(model, EncoderModel):
        return model.encode(params, TEXTS, jnp.zeros(2, jnp.int32), jnp.full(2, 12))
    return model.encode(params, TEXTS)


def test_a_matrix_is_off_by_at_most_half_a_scale():
    kernel = jax.random.normal(jax.random.key(0), (3, 16, 8)) * jnp.arange(8)  # the first channel is zero
    matrix, scale = quantise(jnp.array(kernel, copy=True))
    assert matrix.dtype == jnp.int8 and scale.shape == (3, 8)
    error = jnp.abs(matrix * scale[:, None] - kernel)
    assert (error <= 0.501 * scale[:, None]).all()
    np.testing.assert_array_equal(jnp.abs(matrix).max(axis=1)[:, 1:], 127)


@pytest.mark.parametrize("family", [*TINY_CONFIGS, "deberta-v2"])
def test_a_checkpoint_is_rounded_as_it_is_read(family, tmp_path):
    """int8 layers compute what the rounded matrices compute, stacked and unrolled, on one device and on four."""
    model = EncoderModel(TINY_DEBERTA) if family == "deberta-v2" else CausalModel(TINY_CONFIGS[family], "reward")
    save_model(tmp_path, model, random_params(model))
    plain = load_model(tmp_path, "reward")
    loaded = load_model(tmp_path, "reward", int8=True)
    assert loaded.model == dataclasses.replace(plain.model, int8=True)
    floats = rounded(loaded.params)
    for (path, exact), near in zip(
        jax.tree_util.tree_leaves_with_path(plain.params), jax.tree.leaves(floats), strict=True
    ):
        np.testing.assert_allclose(near, exact, atol=0.006, err_msg=jax.tree_util.keystr(path))
    wanted = outputs(plain.model, floats)
    np.testing.assert_allclose(outputs(loaded.model, loaded.params), wanted, atol=1e-5)
    np.testing.assert_allclose(outputs(*unstack_layers(loaded.model, loaded.params)), wanted, atol=1e-5)
    with jax.set_mesh(make_mesh("cpu-4,fsdp=2,tensor=2", "decode")):
        spread = load_model(tmp_path, "reward", int8=True)
        np.testing.assert_allclose(jax.jit(outputs, static_argnums=0)(spread.model, spread.params), wanted, atol=1e-5)


def test_weights_that_are_not_finite_are_found_and_models_in_int8_are_not_saved(tmp_path):
    model, params = CausalModel(TINY_CONFIGS["gpt2"]), random_params(CausalModel(TINY_CONFIGS["gpt2"]))
    params["backbone"]["layers"]["up"]["kernel"] = params["backbone"]["layers"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    save_model(tmp_path, model, params)
    with pytest.raises(Exception, match=r"NaN or infinite numbers.*h\.1\.mlp\.c_fc\.weight"):
        load_model(tmp_path, "vocabulary", int8=True)
    with pytest.raises(ValueError, match="int8 is for decoding"):
        save_model(tmp_path, dataclasses.replace(model, int8=True), params)
