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
    seeds = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(seed, shape, dtype) for seed, shape in zip(seeds, shapes, strict=True)]
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
        (3 * BLOCK - 1, prefix_causal, {"queries": False}),
        (BLOCK + 5, blind, {"keys": False}),
        (BLOCK, blind, {"keys": False, "queries": False}),
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


@pytest.mark.parametrize(("axes", "rows"), [("data=2,tensor=2", 4), ("fsdp=2,tensor=2", 3)])
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
    is_causal = kind is PrefixCausalModel
    config = dataclasses.replace(TINY_DEBERTA, attention="prefix_causal" if is_causal else "full", remat="layers")
    model = kind(config)
    params = random_params(model)
    length = BLOCK + 6
    tokens = np.random.default_rng(0).integers(3, 61, (2, length), np.int32)
    starts, ends = np.array([0, 4], np.int32), np.array([length - 2, length], np.int32)
    slots = np.arange(length)
    valid = (slots >= starts[:, None]) & (slots < ends[:, None])
    bounds = (starts,) if is_causal else (starts, ends)

    def loss(params):
        hidden = model.encode(params, tokens, *bounds, prompt_width=BLOCK // 2) * valid[..., None]
        return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum(), hidden

    def run():
        return jax.jit(jax.value_and_grad(loss, has_aux=True) if is_causal else lambda params: loss(params))(params)

    expected = run()
    monkeypatch.setattr(deberta, "attend_by_distance", in_interpreter)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), run(), expected)


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


def test_operations_of_the_kernel_are_counted():
    """A tile of queries and keys has the product of both, one with twice as many positions for each, and the values."""
    arrays, mask = inputs(2 * BLOCK), padded(2 * BLOCK)
    attend = partial(in_interpreter, scale=SCALE)
    assert count_operations(attend, *arrays, mask) == 6 * 2 * ROWS * HEADS * (2 * BLOCK) ** 2 * WIDTH


COMPILED = """
import sys
from pargs_jax.aot import expect_no_devices
name = sys.argv[1]
expect_no_devices(name)
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from pargs_jax.commands.compile_only import abstract_rows, lower
from pargs_jax.mesh import make_topology_mesh
from pargs_jax.models.disentangled import PositionTable, attend_by_distance

rows, heads, length, width = map(int, sys.argv[2:])
mesh = make_topology_mesh(name, "train")
texts = abstract_rows(mesh, rows, heads, length, width, dtype="bfloat16")
whole = NamedSharding(mesh, PartitionSpec())
table = jax.ShapeDtypeStruct((heads, 2 * length - 1, width), "bfloat16", sharding=whole)
arguments = (texts, texts, texts, PositionTable(table, table), abstract_rows(mesh, rows, length, length, dtype="bool"))


def loss(queries, keys, values, table, mask):
    return (attend_by_distance(queries, keys, values, table, mask, 0.1).astype(jnp.float32) ** 2).sum()


print(lower(mesh, jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))), arguments).compile().as_text())
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs the extra tpu")
def test_a_gradient_on_tpus_writes_no_scores():
    rows, heads, parts = 2, 4, 4
    words = ["tpu-v4-8,fsdp=2,tensor=2", *map(str, (rows, heads, LONGEST, 64))]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *words],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "disentangled_attention_backward" in done.stdout
    sizes = re.findall(r"\b(?:f32|bf16|pred|s8|s32)\[([\d,]+)\]", done.stdout)
    largest = max(prod(map(int, dims.split(","))) for dims in sizes)
    assert largest < rows * heads * LONGEST**2 / parts
