"""Low-rank additions: nothing at first, then what the merged matrices are."""

import dataclasses

import jax
import numpy as np
import pytest

from pargs_jax.errors import InputError
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.lora import Lora, draw_lora, join_params, merge_lora, split_params
from pargs_jax.models.model import unstack_layers
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model

TOKENS = np.arange(1, 11).reshape(2, 5)


def outputs(model, params):
    if isinstance(model, EncoderModel):
        return model.text_rewards(params, TOKENS, np.zeros(2, np.int32), np.full(2, 5))
    return model.rewards(params, model.encode(params, TOKENS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "deberta"])
def test_additions_start_at_zero_and_merge_exactly(family):
    if family == "deberta":
        model = EncoderModel(TINY_DEBERTA)
        params = random_params(model)
    else:
        model, params = tiny_model(family, "reward")
    lora = Lora(rank=3, alpha=6.0)
    adapted = dataclasses.replace(model, lora=lora)
    additions = draw_lora(adapted.abstract_params(), jax.random.key(0))
    both = join_params(params, additions)
    plain = outputs(model, params)
    np.testing.assert_allclose(outputs(adapted, both), plain, atol=1e-6)

    drawn = split_params(both, ("lora_out",))[0]
    noise = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), drawn)
    both = join_params(split_params(both, ("lora_out",))[1], noise)
    changed = outputs(adapted, both)
    assert np.abs(changed - plain).max() > 1e-2
    merged = merge_lora(lora, both)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(outputs(model, merged), changed, atol=1e-5)
    np.testing.assert_allclose(outputs(*unstack_layers(adapted, both)), changed, atol=1e-5)


def test_a_pattern_that_matches_no_layer_is_an_error():
    model, _ = tiny_model("gpt2")
    with pytest.raises(InputError, match=r"\Alora.layers gate: matches none of down, key, out, query, up, value"):
        dataclasses.replace(model, lora=Lora(layers="gate")).abstract_params()
