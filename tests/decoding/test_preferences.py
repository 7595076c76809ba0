"""PARM: one reward model for all preference vectors, a different one in each row of a batch."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.decoding.guides import AutoregressiveGuide, PreferenceGuide, PreferredPrompts
from pargs_jax.decoding.loop import Decoder, advance, decode, row_keys, start
from pargs_jax.decoding.proposals import AllTokens
from pargs_jax.decoding.state import RowSettings, insert, take
from pargs_jax.mesh import make_mesh
from pargs_jax.models.model import stack_layers, unstack_layers
from pargs_jax.models.preference_lora import PreferenceLora, with_preferences
from pargs_jax.sharding import place_params
from pargs_jax.testing import tiny_model

V, STEPS = 61, 6
LORA = PreferenceLora(objectives=3, layers="query|key|value|down")
PREFERENCES = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.2, 0.8], [0.0, 0.2, 0.8], [0.4, 0.3, 0.3]])
PROMPTS, LENGTHS = np.random.default_rng(0).integers(4, V, (4, 5)), np.full(4, 5)
KEYS = row_keys(0, jnp.asarray([1, 2, 3, 4], jnp.uint32))
take, insert = jax.jit(take), jax.jit(insert)


def merge_preference(lora, params, preference):
    """Ordinary params: for one preference vector, every addition is merged into its matrix. Computed in fp32."""
    if not isinstance(params, dict):
        return params
    if "addition" not in params:
        return {name: merge_preference(lora, part, preference) for name, part in params.items()}
    rest, own = {name: part for name, part in params.items() if name != "addition"}, params["addition"]
    mix = jnp.einsum("m,...mrs->...rs", preference, own["own_mix"])
    added = own["shared_in"] @ own["shared_mix"] @ own["shared_out"] + own["own_in"] @ mix @ own["own_out"]
    kernel = params["kernel"]
    return rest | {"kernel": (kernel.astype(jnp.float32) + lora.alpha / lora.rank * added).astype(kernel.dtype)}


@lru_cache
def conditioned(unrolled):
    """A reward model with random additions, and its ordinary part."""
    model, params = tiny_model("llama", seed=1)
    adapted = dataclasses.replace(model, lora=LORA)
    rng = np.random.default_rng(2)

    def fill(path, leaf):
        found = params
        for key in path:
            if key.key == "addition":
                scale = 1.0 if path[-1].key == "preference" else 0.3
                return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)
            found = found[key.key]
        return found

    full = jax.tree_util.tree_map_with_path(fill, adapted.abstract_params())
    return unstack_layers(adapted, full) if unrolled else (adapted, full)


def settings(rows=4):
    return RowSettings.alike(rows, weights=[3.0], candidates=V, max_new_tokens=STEPS)


def decoder_with(guide):
    return Decoder(tiny_model("gpt2")[0], (guide,), AllTokens(), eos_ids=(0,))


@lru_cache
def answers():
    model, params = conditioned(True)
    own = (PreferredPrompts(None, PREFERENCES),)
    lm_params = tiny_model("gpt2")[1]
    decoder = decoder_with(PreferenceGuide(model, V))
    return decode(decoder, lm_params, (params,), PROMPTS, LENGTHS, KEYS, settings(), STEPS, own)


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_row_is_read_as_the_model_merged_for_its_preference(unrolled):
    model, params = conditioned(unrolled)
    found = model.encode(with_preferences(params, PREFERENCES), PROMPTS)
    plain = dataclasses.replace(model, lora=None)
    for row in range(4):
        merged = merge_preference(LORA, params, PREFERENCES[row])
        np.testing.assert_allclose(found[row], plain.encode(merged, PROMPTS[row : row + 1])[0], atol=1e-4)
    assert np.abs(found[1] - found[0]).max() > 0.1
    # The equation of the addition, by hand.
    layer = stack_layers(model, params)[1]["backbone"]["layers"]["query"]
    own = jax.tree.map(lambda x: np.float64(x[0]), layer["addition"])
    mix = sum(a * w for a, w in zip(np.float64(PREFERENCES[3]), own["own_mix"], strict=True))
    shared = own["shared_in"] @ own["shared_mix"] @ own["shared_out"]
    expected = layer["kernel"][0] + 2.0 * (shared + own["own_in"] @ mix @ own["own_out"])
    merged = stack_layers(plain, merge_preference(LORA, params, PREFERENCES[3]))[1]["backbone"]["layers"]["query"]
    np.testing.assert_allclose(merged["kernel"][0], expected, atol=1e-5)


def test_each_row_has_its_own_preference():
    model, params = conditioned(True)
    found = answers()
    guide = AutoregressiveGuide(dataclasses.replace(model, lora=None), V)
    lm_params = tiny_model("gpt2")[1]
    for row in range(4):
        merged = merge_preference(LORA, params, PREFERENCES[row])
        one = slice(row, row + 1)
        alone = decode(
            decoder_with(guide), lm_params, (merged,), PROMPTS[one], LENGTHS[one], KEYS[one], settings(1), STEPS
        )
        np.testing.assert_array_equal(alone.tokens[0], found.tokens[row])
        np.testing.assert_allclose(alone.trace.rewards[0], found.trace.rewards[row], atol=1e-4)


def test_a_rows_preference_goes_with_it():
    model, params = conditioned(True)
    decoder = decoder_with(PreferenceGuide(model, V))
    all_params = (tiny_model("gpt2")[1], (params,))

    def begin(rows):
        own = (PreferredPrompts(None, PREFERENCES[rows]),)
        return start(decoder, all_params, PROMPTS[rows], LENGTHS[rows], KEYS[rows], settings(len(rows)), STEPS, own)

    state = advance(decoder, all_params, begin(np.arange(4)), 2)
    state = take(state, jnp.asarray([3, 2, 1, 0]))
    state = insert(state, begin(np.asarray([2])), jnp.asarray([0]))
    for _ in range(STEPS // 2):  # as many steps a call as before, which are compiled
        state = advance(decoder, all_params, state, 2)
    found = decoder.read(state)
    np.testing.assert_array_equal(found.tokens, answers().tokens[np.asarray([2, 2, 1, 0])])


def test_four_devices_equal_one():
    model, params = conditioned(True)
    with jax.set_mesh(make_mesh("cpu-4,data=2,tensor=2", "decode")):
        lm_params = place_params(tiny_model("gpt2")[1])
        own = (PreferredPrompts(None, PREFERENCES),)
        decoder = decoder_with(PreferenceGuide(model, V))
        found = decode(decoder, lm_params, (place_params(params),), PROMPTS, LENGTHS, KEYS, settings(), STEPS, own)
    np.testing.assert_array_equal(found.tokens, answers().tokens)
