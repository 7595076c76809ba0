"""How parameters are sharded: every array has a rule, and every rule is used."""

import dataclasses

import jax
import numpy as np
import pytest

from pargs_jax.errors import InputError
from pargs_jax.mesh import make_mesh
from pargs_jax.models.causal import CausalModel
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.lora import Lora
from pargs_jax.models.model import unstack_layers
from pargs_jax.sharding import (
    abstract_params,
    dimension_names,
    map_paths,
    name_dimensions,
    padded_shape,
    place_computed,
    place_params,
    shardings_of,
    to_host,
)
from pargs_jax.testing import TINY_CONFIGS, TINY_DEBERTA, random_params, tiny_model

DEBERTA_WITH_ALL = dataclasses.replace(
    TINY_DEBERTA, convolution_width=3, absolute_positions=True, segments=2, embedding_width=16,
    share_attention_key=False,
)  # fmt: skip
MODELS = [
    *(CausalModel(config, head) for config in TINY_CONFIGS.values() for head in ("vocabulary", "reward")),
    EncoderModel(DEBERTA_WITH_ALL),
    dataclasses.replace(CausalModel(TINY_CONFIGS["llama"], "reward"), lora=Lora(2)),
    dataclasses.replace(CausalModel(TINY_CONFIGS["llama"]), lora=Lora(2, layers=".*|embed|head")),
    dataclasses.replace(CausalModel(TINY_CONFIGS["gpt2"]), lora=Lora(2, layers="embed")),
]


def paths_of(params):
    paths = []
    map_paths(lambda path, _: paths.append(path), params)
    return paths


def local_shapes(params):
    shapes = {}
    map_paths(lambda path, x: shapes.update({path: x.addressable_shards[0].data.shape}), params)
    return shapes


def test_every_matrix_has_a_dimension_that_is_split():
    for model in MODELS:
        for path in paths_of(model.abstract_params()):
            names = dimension_names(path, 4)
            assert any(names) or path.endswith((".bias", ".scale")), path


def test_an_array_is_called_the_same_in_all_families():
    name_dimensions("backbone.layers.query.kernel", ("width", "heads"))  # as it is called already
    with pytest.raises(ValueError, match=r"^backbone\.layers\.query\.kernel: .* give it another path"):
        name_dimensions("backbone.layers.query.kernel", ("width", "feedforward"))
    with pytest.raises(ValueError, match="not depth"):
        name_dimensions("backbone.new.kernel", ("depth",))
    with pytest.raises(ValueError, match=r"backbone\.new\.kernel: no model family"):
        dimension_names("backbone.new.kernel", 2)


@pytest.mark.parametrize("mesh", ["cpu-4", "cpu-4,tensor=4", "cpu-4,fsdp=2,tensor=2"])
def test_each_device_holds_its_share(mesh):
    """Matrices are split by every axis that their rule names, whatever the family, stacked or not."""
    with jax.set_mesh(make_mesh(mesh, "train")):
        for model in MODELS:
            params = place_params(random_params(model))
            total = sum(x.nbytes for x in jax.tree.leaves(params) if x.ndim > 1)
            here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params) if x.ndim > 1)
            assert here < total * (0.55 if mesh == "cpu-4,tensor=4" else 0.4)
            stacked = {path: shape[1:] for path, shape in local_shapes(params["backbone"]["layers"]).items()}
            _, single = unstack_layers(model, params)
            assert local_shapes(single["backbone"]["layers"][1]) == stacked


def test_placing_pads_the_vocabulary_and_keeps_every_number():
    model, params = tiny_model("gpt2")
    with jax.set_mesh(make_mesh("cpu-4,tensor=4", "train")) as _:
        mesh = jax.sharding.get_mesh()
        placed = place_params(params)
        described = abstract_params(mesh, model.abstract_params())
        drawn = place_computed(model.init, 3)
    for tree in (placed, drawn):
        assert shardings_of(tree) == shardings_of(described)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), described)
    for expected, tree in ((params, placed), (model.init(jax.random.key(3)), drawn)):
        cut = jax.tree.map(lambda x, like: to_host(x)[tuple(map(slice, like.shape))], tree, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cut, jax.device_get(expected))
    assert padded_shape("head.linear.kernel", (32, 61)) == (32, 128)
    assert padded_shape("head.linear.kernel", (32, 1)) == (32, 1)


def test_a_dimension_that_does_not_divide_is_one_line():
    config = dataclasses.replace(TINY_CONFIGS["llama"], feedforward=50)
    with jax.set_mesh(make_mesh("cpu-4,tensor=4", "train")), pytest.raises(InputError) as caught:
        place_params(random_params(CausalModel(config, "reward")))
    assert str(caught.value) == (
        "mesh: tensor=4 does not divide the 50 of backbone.layers.down.kernel (feedforward); "
        "give another size of the axis tensor"
    )
