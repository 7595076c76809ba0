"""Heads as entries of a registry: one entry makes, draws, stores and reads a head, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.heads import CAUSAL_HEADS, Head
from pargs_jax.models.hf import load_model, save_model
from pargs_jax.models.layers import Linear
from pargs_jax.models.tables import linear
from pargs_jax.testing import TINY_CONFIGS, random_params, tiny_model


class WorthHead(nnx.Module):
    """A worth of each state, stored beside a language model."""

    def __init__(self, width, std, *, rngs):
        self.linear = Linear(width, 1, kernel_init=nnx.initializers.normal(std), rngs=rngs)

    def __call__(self, hidden):
        return self.linear(hidden)[..., 0]


@pytest.fixture
def worth_head(monkeypatch):
    entry = Head(
        lambda config, std, rngs: WorthHead(config.head_width, std, rngs=rngs),
        outputs=lambda config: 1,
        rows=linear("worth_head", "linear", ("width", "vocabulary")),
        class_suffix="ForCausalLM",
        may_be_new=True,
        std=lambda config: 0.0,
    )
    monkeypatch.setitem(CAUSAL_HEADS, "worth", entry)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_new_head_is_one_entry(family, worth_head, tmp_path):
    model = CausalModel(TINY_CONFIGS[family], "worth")
    params = random_params(model)
    save_model(tmp_path, model, params)
    stored = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(stored["worth_head.weight"], np.asarray(params["head"]["linear"]["kernel"]).T)
    loaded = load_model(tmp_path, "worth")
    assert loaded.model == model and not loaded.new_head
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)

    begun = load_model(tmp_path, "reward")  # the same backbone under another head
    assert begun.new_head and begun.params["head"]["linear"]["kernel"].std() > 0
    jax.tree.map(np.testing.assert_array_equal, begun.params["backbone"], params["backbone"])


def test_a_head_that_a_checkpoint_lacks_begins_as_its_entry_says(worth_head, tmp_path):
    model, params = tiny_model("llama", "reward")
    save_model(tmp_path, model, params)
    loaded = load_model(tmp_path, "worth")
    assert loaded.new_head and not any(x.any() for x in jax.tree.leaves(loaded.params["head"]))
    hidden = loaded.model.encode(loaded.params, jnp.arange(8)[None])
    assert not loaded.model.rewards(loaded.params, hidden).any()
