"""Sliding windows: what a token sees, and the same through a cache whose texts grow and shrink across their edge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.layers import BesideCache, InCache
from pargs_jax.models.model import unstack_layers
from pargs_jax.models.windows import sights_of_layers, within
from pargs_jax.testing import TINY_CONFIGS, random_params

TOTAL = 14
STARTS = np.array([0, 3])


@pytest.fixture(autouse=True)
def operation_by_operation():
    """Compiling takes far longer than running these models operation by operation."""
    with jax.disable_jit():
        yield


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_texts_that_grow_and_shrink_in_a_cache_equal_whole_texts(family, unrolled):
    model = CausalModel(TINY_CONFIGS[family], "reward")
    params = random_params(model, std=0.3)
    tokens = np.random.default_rng(0).integers(0, 61, (2, TOTAL))
    whole = np.asarray(model.encode(params, tokens, STARTS))
    decoder, layers = unstack_layers(model, params) if unrolled else (model, params)

    last, cache = decoder.prefill(layers, tokens[:, :4], 4 - STARTS, TOTAL)
    np.testing.assert_allclose(last, whole[:, 3], atol=1e-5)
    read = np.array([4, 4])  # how many slots of `tokens` are in the cache, by row
    count = 4
    for forgotten in ((2, 0), (0, 3), (0, 0)):
        places = read[:, None] + np.arange(count)
        hidden, cache = decoder.append(layers, cache, np.take_along_axis(tokens, places, 1), jnp.full(2, count))
        np.testing.assert_allclose(hidden, np.take_along_axis(whole, places[..., None], 1), atol=1e-5)
        cache = cache.forget(jnp.asarray(forgotten))
        read = read + count - forgotten

    # Far texts do not matter: within the windows of all layers they are the same.
    if family == "mistral":
        other = tokens.copy()
        other[:, :4] = (other[:, :4] + 1) % 61
        far = 4 + 2 * (5 - 1)
        np.testing.assert_allclose(model.encode(params, other, STARTS)[:, far:], whole[:, far:], atol=1e-6)
        assert np.abs(model.encode(params, other, STARTS)[:, far - 1] - whole[:, far - 1]).max() > 1e-4


def test_a_window_is_a_condition_on_positions():
    positions = jnp.arange(6)[None]
    expected = np.tri(6, dtype=bool) & ~np.tri(6, k=-3, dtype=bool)
    causal = jnp.tril(jnp.ones((1, 6, 6), bool))
    np.testing.assert_array_equal(within(causal, positions, 3)[0], expected)
    assert within(causal, positions, None) is causal

    # Tokens at positions 4 and 5 behind four cached ones, and at their places in the cache.
    new = positions[:, 4:]
    beside = within(BesideCache(jnp.ones((1, 4), bool), jnp.tril(jnp.ones((2, 2), bool))), new, 3)
    np.testing.assert_array_equal(jnp.concatenate([beside.valid, beside.mask], axis=-1)[0], expected[4:])
    inside = within(InCache(jnp.asarray([4]), causal[:, 4:]), new, 3)
    np.testing.assert_array_equal(inside.mask[0], expected[4:])

    # Two tokens of padding before the cached ones: their positions are not their slots.
    padded = BesideCache(jnp.arange(6)[None] >= 2, jnp.tril(jnp.ones((2, 2), bool)), jnp.arange(6)[None] - 2)
    np.testing.assert_array_equal(within(padded, new, 3).valid[0, :, 2:], expected[4:, :4])


def test_layers_may_differ_and_a_traced_number_finds_the_same():
    causal, positions = jnp.tril(jnp.ones((1, 6, 6), bool)), jnp.arange(6)[None]
    sights = sights_of_layers(causal, positions, (2, None, 4))
    for layer, window in enumerate((2, None, 4)):
        np.testing.assert_array_equal(sights(layer), within(causal, positions, window))
        np.testing.assert_array_equal(sights(jnp.asarray(layer)), within(causal, positions, window))


def test_windows_of_all_layers_in_a_config():
    config = dataclasses.replace(TINY_CONFIGS["gemma3"], windows=(None, 7))
    assert config.to_hf()["layer_types"] == ["full_attention", "sliding_attention"]
    assert config.to_hf()["sliding_window"] == 7
    assert "sliding_window" not in dataclasses.replace(config, windows=()).to_hf()
