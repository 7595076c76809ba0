"""Outputs depend only on the tokens up to their own, and cached and uncached passes agree."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.models.causal import CausalModel
from pargs_jax.models.model import Params, stack_layers, unstack_layers
from pargs_jax.testing import TINY_CONFIGS

PROMPT, TOTAL = 6, 12
# At this size compiling takes far longer than running.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
encode = quick_jit(CausalModel.encode, static_argnums=0)
prefill = quick_jit(CausalModel.prefill, static_argnums=(0, 4))
keep = quick_jit(CausalModel.keep, static_argnums=0)
siblings = quick_jit(CausalModel.siblings, static_argnums=0)


class Tiny(NamedTuple):
    model: CausalModel
    params: Params


@pytest.fixture(scope="module", params=TINY_CONFIGS)
def tiny(request):
    """A reward model with stacked layers, for each family; weights from numpy, which has nothing to compile."""
    model = CausalModel(TINY_CONFIGS[request.param], "reward")
    rng = np.random.default_rng(0)
    return Tiny(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), model.abstract_params())
    )


@pytest.fixture(scope="module", params=["stacked", "unrolled"])
def decoder(request, tiny):
    """The same reward model in either layout of its layers."""
    return tiny if request.param == "stacked" else Tiny(*unstack_layers(*tiny))


@pytest.fixture(scope="module")
def prefilled(decoder):
    """Two prompts of which the second has two tokens of left padding, their last states, and the cache that holds
    them."""
    prompts = np.random.default_rng(0).integers(0, 61, (2, PROMPT))
    last, cache = prefill(*decoder, prompts, jnp.asarray([PROMPT, PROMPT - 2]), TOTAL + 3)
    return prompts, last, cache


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_no_gradient_reaches_padding_later_tokens_or_other_candidates(tiny):
    padding, count = 2, 3
    tokens = jnp.arange(10, 10 + PROMPT + count)  # all distinct: a row of the embedding table is one slot
    prompt, candidates = tokens[None, :PROMPT], tokens[None, PROMPT:]

    def rewards(table):
        backbone = {**tiny.params["backbone"], "embed": {"embedding": table}}
        params = {**tiny.params, "backbone": backbone}
        start = jnp.asarray([padding])
        hidden = tiny.model.encode(params, prompt, start)
        _, cache = tiny.model.prefill(params, prompt, PROMPT - start, PROMPT + 1)
        alternatives, _ = tiny.model.siblings(params, cache, candidates)
        return tiny.model.rewards(params, jnp.concatenate([hidden, alternatives], axis=1))[0]

    gradients = quick_jit(jax.jacrev(rewards))(tiny.params["backbone"]["embed"]["embedding"])
    depends = np.asarray(gradients[:, tokens] != 0).any(-1)

    expected = np.tri(PROMPT + count, dtype=bool)
    expected[:, :padding] = False
    expected[PROMPT:, PROMPT:] = np.eye(count)
    np.testing.assert_array_equal(depends[padding:], expected[padding:])


def test_padding_and_batch_mates_do_not_matter(tiny):
    rng = np.random.default_rng(1)
    text = rng.integers(0, 61, 7)
    alone = encode(*tiny, text[None])[0]

    starts = np.array([0, 2, 5, 0, 1, 4])  # the text in the first three rows, other texts beside it
    batch = rng.integers(0, 61, (6, TOTAL))
    for row in range(3):
        batch[row, starts[row] : starts[row] + 7] = text
    hidden = encode(*tiny, batch, starts)
    for row in range(3):
        assert_close(hidden[row, starts[row] : starts[row] + 7], alone)


def test_cached_siblings_equal_separate_uncached_passes(tiny, decoder, prefilled):
    prompts, last, cache = prefilled
    starts = np.array([0, 2])
    rng = np.random.default_rng(2)
    texts = rng.integers(0, 61, (2, 3, TOTAL))  # each candidate's text; right of the candidate is anything
    texts[:, :, :PROMPT] = prompts[:, None]

    for slot in range(PROMPT, PROMPT + 3):
        candidates = texts[:, :, slot]
        alternatives, pending = siblings(*decoder, cache, candidates)
        uncached = encode(*tiny, texts.reshape(6, TOTAL), starts.repeat(3)).reshape(2, 3, TOTAL, -1)
        assert_close(alternatives, uncached[:, :, slot])
        assert_close(last, uncached[:, 0, PROMPT - 1])

        choice = np.array([slot % 3, 2])
        cache = keep(decoder.model, cache, pending, np.ones(2, bool), choice)
        texts[:, :, slot] = candidates[np.arange(2), choice][:, None]
    np.testing.assert_array_equal(cache.lengths, PROMPT + 3 - starts)


def test_a_changed_candidate_changes_itself_alone(decoder, prefilled):
    cache = prefilled[2]
    before, _ = siblings(*decoder, cache, np.array([[3, 4, 5], [6, 7, 8]]))
    after, _ = siblings(*decoder, cache, np.array([[3, 9, 5], [6, 7, 8]]))
    same = np.array(before == after).all(-1)
    np.testing.assert_array_equal(same, [[True, False, True], [True, True, True]])


def test_keeping_an_only_sibling_equals_choosing_it_and_rows_that_are_not_live_stay(decoder, prefilled):
    model, cache, live = decoder.model, prefilled[2], np.array([True, False])
    _, several = siblings(*decoder, cache, np.array([[3, 4, 5], [6, 7, 8]]))
    _, only = siblings(*decoder, cache, np.array([[4], [7]]))
    chosen, kept = keep(model, cache, several, live, np.array([1, 1])), keep(model, cache, only, live)
    for found in (chosen, kept):
        np.testing.assert_array_equal(found.lengths, [PROMPT + 1, PROMPT - 2])
    real = chosen.valid[:, None, :, None]
    jax.tree.map(lambda x, y: assert_close(jnp.where(real, x, 0), jnp.where(real, y, 0)), chosen.kv, kept.kv)


def test_layouts_convert_back_and_forth(tiny):
    unrolled = unstack_layers(*tiny)
    model, params = stack_layers(*unrolled)
    assert model == tiny.model
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params)
    assert jax.tree.map(jnp.shape, unrolled[1]) == jax.tree.map(jnp.shape, unrolled[0].abstract_params())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_half_precision_reaches_the_cache_and_outputs_stay_single(family, tied):
    config = dataclasses.replace(TINY_CONFIGS[family], tied_embeddings=tied)
    for head in ("vocabulary", "reward"):
        model = CausalModel(config, head)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), model.abstract_params())
        prompts, lengths = jnp.zeros((2, PROMPT), int), jnp.ones(2, int)
        hidden, cache = jax.eval_shape(partial(model.prefill, slots=TOTAL), params, prompts, lengths)
        assert hidden.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(cache.kv)} == {jnp.dtype(jnp.bfloat16)}
        read = model.logits if head == "vocabulary" else model.rewards
        assert jax.eval_shape(read, params, hidden).dtype == jnp.float32


def test_dropout_acts_only_when_a_key_is_given(tiny):
    dropping = dataclasses.replace(tiny.model, config=dataclasses.replace(tiny.model.config, dropout=0.5))
    tokens = np.arange(7)[None]

    @quick_jit
    def passes(params, keys):
        without = dropping.encode(params, tokens)
        return without, jax.vmap(lambda key: dropping.encode(params, tokens, key=key))(keys)

    without, dropped = passes(tiny.params, jax.random.split(jax.random.key(0), 2))
    plain = encode(*tiny, tokens)
    assert_close(without, plain)
    assert (np.abs(dropped - plain) > 0.01).mean() > 0.5
    assert (np.abs(dropped[0] - dropped[1]) > 0.01).mean() > 0.5
