"""Low-rank additions: nothing at first, then what the merged matrices are."""

import dataclasses
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pargs_jax.errors import InputError
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.layers import Embedding
from pargs_jax.models.lora import Lora, draw_lora, join_params, merge_lora, split_params
from pargs_jax.models.model import unstack_layers
from pargs_jax.sharding import map_paths
from pargs_jax.testing import TINY_DEBERTA, random_params, tiny_model

TOKENS = np.arange(1, 11).reshape(2, 5)


def outputs(model, params):
    if isinstance(model, EncoderModel):
        return model.text_rewards(params, TOKENS, np.zeros(2, np.int32), np.full(2, 5))
    hidden = model.encode(params, TOKENS)
    return model.rewards(params, hidden) if model.head == "reward" else model.logits(params, hidden)


def paths_of(tree):
    found = []
    map_paths(lambda path, _: found.append(path), tree)
    return found


CASES = [
    ("gpt2", "reward", ".*"),
    ("llama", "reward", ".*"),
    ("opt", "reward", ".*"),
    ("deberta", "reward", ".*"),
    ("deberta", "reward", "embed"),
    ("llama", "vocabulary", "embed"),
    ("llama", "vocabulary", "head"),
    ("gpt_neox", "vocabulary", ".*|embed|head"),
    ("llama", "table", "(query|embed|head)"),
    # The table is the head's too. OPT projects it, Gemma 3 scales what it gives and limits logits.
    ("gpt2", "vocabulary", "embed"),
    ("opt", "vocabulary", "query|embed"),
    ("gemma3", "vocabulary", "embed"),
]


@pytest.fixture
def operation_by_operation():
    """Compiling takes far longer than running these once."""
    with jax.disable_jit():
        yield


@pytest.mark.usefixtures("operation_by_operation")
@pytest.mark.parametrize(("family", "head", "layers"), CASES)
def test_additions_start_at_zero_and_merge_exactly(family, head, layers):
    if family == "deberta":
        model = EncoderModel(TINY_DEBERTA)
        params = random_params(model)
    else:
        model, params = tiny_model(family, head)
    lora = Lora(rank=3, alpha=6.0, layers=layers)
    adapted = dataclasses.replace(model, lora=lora)
    additions = draw_lora(adapted.abstract_params(), jax.random.key(0))
    both = join_params(params, additions)
    plain = outputs(model, params)
    np.testing.assert_allclose(outputs(adapted, both), plain, atol=1e-6)

    noise = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), additions)
    both = join_params(params, noise)
    changed = outputs(adapted, both)
    assert np.abs(changed - plain).max() > 1e-2
    merged = merge_lora(lora, both)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(outputs(model, merged), changed, atol=1e-5)
    np.testing.assert_allclose(outputs(*unstack_layers(adapted, both)), changed, atol=1e-5)


def test_a_pattern_that_matches_no_layer_is_an_error():
    model, _ = tiny_model("gpt2")
    with pytest.raises(
        InputError, match=r"(?m)\Alora.layers gate: matches none of down, key, out, query, up, value, embed$"
    ):
        dataclasses.replace(model, lora=Lora(layers="gate")).abstract_params()


@pytest.mark.parametrize(
    ("layers", "outside"),
    [
        (".*", []),
        (r"\w+|value", []),
        ("(?!embed|head).*", []),
        ("query|embed", ["backbone.embed"]),
        (".*|head", ["head.linear"]),
        ("(query|embed|head)", ["backbone.embed", "head.linear"]),
        ("embedding|header|query", []),
    ],
)
def test_embeddings_and_head_must_be_spelled_out(layers, outside):
    model, _ = tiny_model("llama", "vocabulary")
    additions = draw_lora(dataclasses.replace(model, lora=Lora(layers=layers)).abstract_params(), jax.random.key(0))
    found = {path.rpartition(".")[0] for path in paths_of(additions)}
    assert sorted(path for path in found if not path.startswith("backbone.layers.")) == outside
    assert any(path.startswith("backbone.layers.") for path in found)


def test_layers_of_blocks_are_drawn_alike_with_and_without_the_others():
    model, _ = tiny_model("llama", "vocabulary")
    blocks, everything = (
        draw_lora(dataclasses.replace(model, lora=Lora(4, layers=layers)).abstract_params(), jax.random.key(5))
        for layers in (".*", ".*|embed|head")
    )
    jax.tree.map(np.testing.assert_array_equal, blocks["backbone"]["layers"], everything["backbone"]["layers"])
    assert list(blocks) == ["backbone"] and list(blocks["backbone"]) == ["layers"]
    own_key = jax.random.fold_in(jax.random.key(5), zlib.crc32(b"['backbone']['layers']['down']['lora_in']"))
    drawn = jax.random.normal(own_key, (2, 48, 4)) * 48**-0.5
    np.testing.assert_array_equal(blocks["backbone"]["layers"]["down"]["lora_in"], drawn)

    table, head = everything["backbone"]["embed"], everything["head"]["linear"]
    assert table["lora_in"].shape == (61, 4) and not table["lora_in"].any()
    assert table["lora_out"].shape == (4, 32) and 0.5 < np.std(table["lora_out"]) * 32**0.5 < 1.5
    assert head["lora_out"].shape == (4, 61) and not head["lora_out"].any()
    assert head["lora_in"].shape == (32, 4) and 0.5 < np.std(head["lora_in"]) * 32**0.5 < 1.5


@pytest.mark.parametrize(
    ("family", "head", "told"),
    [
        (
            "gpt2",
            "vocabulary",
            "the vocabulary head is tied to the token embeddings, .*; give embed, which changes both",
        ),
        ("llama", "reward", "the head gives one reward and is trained in full already; leave head out"),
    ],
)
def test_a_head_without_a_frozen_matrix_of_its_own_is_refused(family, head, told):
    model, _ = tiny_model(family, head)
    with pytest.raises(InputError, match=rf"(?m)\Alora.layers query\|head: {told}$"):
        dataclasses.replace(model, lora=Lora(layers="query|head")).abstract_params()


def test_the_whole_product_of_an_addition_is_never_computed():
    def read(table, ids, hidden):
        return table(ids), table.attend(hidden)

    table = Embedding(61, 32, 0.1, rngs=nnx.Rngs(0))
    table.lora_in, table.lora_out = nnx.Param(jnp.ones((61, 3))), nnx.Param(jnp.ones((3, 32)))
    table.lora_scale = 2.0
    ids, hidden = np.arange(10).reshape(2, 5), np.ones((2, 5, 32), np.float32)
    program = str(jax.make_jaxpr(read)(table, ids, hidden))
    shapes = re.findall(r"f32\[([\d,]+)\] = dot_general", program)
    assert sorted(shapes) == ["10,3", "10,32", "10,61", "10,61"]


def test_additions_to_table_and_head_keep_bfloat16():
    model, params = tiny_model("llama", "vocabulary")
    lora = Lora(3, layers="embed|head")
    adapted = dataclasses.replace(model, lora=lora)
    noise = random_params(adapted, 3)
    noise = jax.tree.map(lambda x: x + 0.05, split_params(noise, ("lora_in", "lora_out"))[0])
    both = join_params(params, noise)
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), both)
    hidden = adapted.encode(short, TOKENS)
    assert hidden.dtype == jnp.bfloat16 and adapted.logits(short, hidden).dtype == jnp.float32
    np.testing.assert_allclose(outputs(adapted, short), outputs(model, merge_lora(lora, both)), atol=0.1)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merge_lora(lora, short)))
