"""The kernel of disentangled attention gives what the plain form gives, and its program for a TPU has no scores."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pargs_jax.aot.operations import count_operations
from pargs_jax.mesh import make_mesh
from pargs_jax.models import deberta, disentangled_kernel
from pargs_jax.models.disentangled import LONGEST, PositionTable, attend_by_distance, choose_form
from pargs_jax.models.disentangled_kernel import attend_disentangled
from pargs_jax.models.encoder import EncoderModel
from pargs_jax.models.prefix_causal import PrefixCausalModel
from pargs_jax.testing import TINY_DEBERTA, random_params

REPOSITORY = Path(__file__).parents[2]
ROWS, HEADS, WIDTH = 2, 2, 4
BLOCK = 16
"""Two groups of rows that move by different distances."""
SCALE = 0.3
in_interpreter = partial(attend_disentangled, interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(disentangled_kernel, "BLOCKS", (BLOCK,))


def inputs(length, *, keys=True, queries=True, rows=ROWS, dtype=jnp.float32):
    """Random queries, keys, values and tables."""
    shapes = [(rows, HEADS, length, WIDTH)] * 3 + [(HEADS, 2 * length - 1, WIDTH)] * 2
    arrays = [jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(jax.random.key(0), 5), shapes)]
    return (*arrays[:3], PositionTable(arrays[3] if keys else None, arrays[4] if queries else None))


def padded(length, rows=ROWS):
    """All see all but padding, of which each row has another number of tokens."""
    return jnp.broadcast_to(jnp.arange(length) >= jnp.arange(rows)[:, None, None] * 3, (rows, length, length))


def prefix_causal(length, rows=ROWS):
    slots = jnp.arange(length)
    return padded(length, rows) & ((slots[:, None] >= slots) | (slots < length // 3))


def blind(length, rows=ROWS):
    """Some tokens see nothing."""
    return prefix_causal(length, rows) & (jnp.arange(length)[:, None] % 5 != 2)


def by_gather(queries, keys, values, table, mask, scale):
    """The formula, with scores picked by distance; zeros for a token that sees nothing."""
    slots = jnp.arange(queries.shape[2])
    rows = slots[:, None] - slots + len(slots) - 1
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, keys)
    if table.keys is not None:
        scores += jnp.einsum("bhtd,htsd->bhts", queries, table.keys[:, rows])
    if table.queries is not None:
        scores += jnp.einsum("bhsd,htsd->bhts", keys, table.queries[:, rows])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * scale, -1e30), axis=-1) * mask[:, None]
    return jnp.einsum("bhts,bhsd->bhtd", weights, values)


@partial(jax.jit, static_argnums=0)
def with_gradients(attend, arrays, mask):
    def weighted(arrays):
        mixed = attend(*arrays, mask, SCALE)
        return (mixed.astype(jnp.float32) * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum(), mixed

    (_, mixed), gradients = jax.value_and_grad(weighted, has_aux=True)(arrays)
    return mixed, gradients


@pytest.mark.parametrize(
    ("length", "mask", "tables"),
    [
        (2 * BLOCK, padded, {}),
        (2 * BLOCK + 5, padded, {}),
        (BLOCK, prefix_causal, {}),
        (3 * BLOCK - 1, prefix_causal, {}),
        (2 * BLOCK, blind, {}),
        (2 * BLOCK - 3, padded, {"queries": False}),
        (2 * BLOCK - 3, prefix_causal, {"keys": False}),
        (2 * BLOCK - 3, blind, {"keys": False, "queries": False}),
    ],
)
def test_the_kernel_is_the_formula(length, mask, tables):
    arrays, mask = inputs(length, **tables), mask(length)
    found, expected = (with_gradients(attend, arrays, mask) for attend in (in_interpreter, by_gather))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_the_plain_form_is_the_formula():
    arrays, mask = inputs(BLOCK + 3), padded(BLOCK + 3)
    plain = partial(attend_by_distance, form="plain")
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        with_gradients(plain, arrays, mask), with_gradients(by_gather, arrays, mask),
    )  # fmt: skip


def test_bfloat16_is_near_with_gradients_in_bfloat16():
    arrays, mask = inputs(2 * BLOCK + 1, dtype=jnp.bfloat16), prefix_causal(2 * BLOCK + 1)
    found = with_gradients(in_interpreter, arrays, mask)
    exact = with_gradients(by_gather, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), mask)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.02 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(("axes", "rows"), [("data=2,tensor=2", 4), ("data=4", 4), ("fsdp=2,tensor=2", 3)])
def test_on_a_mesh_tables_get_gradients_of_all_rows(axes, rows):
    """Three rows cannot be split: every device has them all, and their gradients count once."""
    length = BLOCK + 3
    arrays, mask = inputs(length, rows=rows), prefix_causal(length, rows)
    expected = with_gradients(by_gather, arrays, mask)
    with jax.set_mesh(make_mesh(f"cpu-4,{axes}", "train")):
        found = jax.jit(with_gradients.__wrapped__, static_argnums=0)(in_interpreter, arrays, mask)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("kind", [EncoderModel, PrefixCausalModel])
def test_a_model_gives_the_same_with_the_kernel(kind, monkeypatch):
    attention = "prefix_causal" if kind is PrefixCausalModel else "full"
    model = kind(dataclasses.replace(TINY_DEBERTA, attention=attention, remat="layers"))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(3, 61, (2, BLOCK + 6), np.int32)
    starts = np.array([0, 4], np.int32)
    options = {"prompt_width": BLOCK // 2} if kind is PrefixCausalModel else {}
    valid = np.arange(tokens.shape[1]) >= starts[:, None]

    def loss(params):
        hidden = model.encode(params, tokens, starts, **options)
        return (hidden * valid[..., None] * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), hidden

    def hidden_and_gradients():
        (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return np.asarray(hidden)[valid], gradients

    expected = hidden_and_gradients()
    monkeypatch.setattr(deberta, "attend_by_distance", in_interpreter)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), hidden_and_gradients(), expected)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "width", "form"),
    [
        ("tpu", "bfloat16", 512, 64, "kernel"),
        ("tpu", "bfloat16", LONGEST + 1, 64, "plain"),
        ("tpu", "bfloat16", 127, 64, "plain"),
        ("tpu", "bfloat16", 512, 256, "plain"),
        ("tpu", "float32", 512, 64, "plain"),
        ("gpu", "bfloat16", 512, 64, "plain"),
        ("cpu", "bfloat16", 512, 64, "plain"),
    ],
)
def test_the_device_and_the_shape_choose_the_form(monkeypatch, platform, dtype, length, width, form):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    assert choose_form(jnp.dtype(dtype), length, width) == form


def test_what_the_kernel_cannot_do_is_refused():
    arrays, mask = inputs(BLOCK), padded(BLOCK)
    with pytest.raises(ValueError, match="bfloat16, not float32"):
        attend_disentangled(*arrays, mask, SCALE)
    long = jax.eval_shape(partial(inputs, LONGEST + 1))
    with pytest.raises(ValueError, match=f"at most {LONGEST} tokens"):
        jax.eval_shape(lambda arrays: attend_disentangled(*arrays, True, SCALE), long)
