"""Attention over whole texts: the kernels give what the plain form gives, and write no scores to memory."""

import importlib.util
import json
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

from pargs_jax.aot.gpu import is_installed
from pargs_jax.aot.operations import count_operations
from pargs_jax.models import attention
from pargs_jax.models.attention import LANES, attend_whole, choose_kernel, plain_attention

REPOSITORY = Path(__file__).parents[2]
ROWS, HEADS, LENGTH, LAYERS = 2, 4, 384, 2
COMPILED = f"""
import sys
from pargs_jax.aot import expect_no_devices
name, folder = sys.argv[1:]
expect_no_devices(name)
import jax
from pargs_jax.commands.compile_only import abstract_rows, lower
from pargs_jax.mesh import make_topology_mesh
from pargs_jax.models.hf import describe_model
from pargs_jax.sharding import abstract_params
mesh = make_topology_mesh(name, "train")
model = describe_model(folder, "reward")
params = abstract_params(mesh, model.abstract_params(), "bfloat16")
texts, starts = abstract_rows(mesh, {ROWS}, {LENGTH}), abstract_rows(mesh, {ROWS})
loss = lambda params, texts, starts: model.rewards(params, model.encode(params, texts, starts)).sum()
print(lower(mesh, jax.jit(jax.grad(loss)), (params, texts, starts)).compile().as_text())
"""


def texts(key, *, rows=1, query_heads=2, heads=1, length=LANES, width=8, dtype=jnp.float32):
    """Random queries, keys and values; a mask with left padding and an answer that does not see the one before it."""
    shapes = [(rows, query_heads, length, width), *[(rows, heads, length, width)] * 2]
    arrays = [jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(key, 3), shapes, strict=True)]
    slots = np.arange(length)
    mask = (slots[:, None] >= slots) & (slots >= 3)
    mask &= ~((slots[:, None] >= 60) & (slots >= 30) & (slots < 60))
    return arrays, jnp.broadcast_to(mask, (rows, length, length))


def with_gradients(attend, arrays, mask, scale=0.3, cap=None):
    def weighted(*arrays):
        mixed = attend(*arrays, mask, scale, cap).astype(jnp.float32)
        return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape))[:, :, 3:].sum()

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))(*arrays)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_splash_kernel_is_plain_attention(cap):
    arrays, mask = texts(jax.random.key(0), length=LANES - 2)  # not a multiple of its blocks
    plain = with_gradients(plain_attention, arrays, mask, cap=cap)
    found = with_gradients(partial(attention._splash, interpret=True), arrays, mask, cap=cap)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, plain)


def test_gradients_in_bfloat16_keep_keys_in_bfloat16():
    arrays, mask = texts(jax.random.key(1), dtype=jnp.bfloat16)
    exact = with_gradients(plain_attention, [x.astype(jnp.float32) for x in arrays], mask)
    found = with_gradients(plain_attention, arrays, mask)
    for mine, theirs in zip(found[1], exact[1], strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=0.03 * float(jnp.abs(theirs).max()))
    gradient = str(jax.make_jaxpr(partial(with_gradients, plain_attention, mask=mask))(arrays))
    assert not re.search(r"f32\[1,1,128,8\] = convert_element_type", gradient)


@pytest.mark.parametrize(
    ("device", "platform", "dtype", "length", "width", "kernel"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 512, 128, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "gpu", "float32", 512, 128, "plain"),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 512, 256, "plain"),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 64, 128, "plain"),
        ("AMD Instinct MI300X", "gpu", "bfloat16", 512, 128, "plain"),
        ("TPU v4", "tpu", "bfloat16", 512, 64, "splash"),
        ("cpu", "cpu", "bfloat16", 512, 64, "plain"),
    ],
)
def test_the_device_and_the_shape_choose_the_kernel(monkeypatch, device, platform, dtype, length, width, kernel):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=device, platform=platform)])
    assert choose_kernel(jnp.dtype(dtype), length, width) == kernel
    assert choose_kernel(jnp.dtype(dtype), length, width, is_capped=True) == {"cudnn": "plain"}.get(kernel, kernel)


def test_operations_of_kernels_are_counted():
    """The splash kernel does the products of the plain form: one block is the whole text here."""
    arrays, mask = texts(jax.random.key(2))
    plain = count_operations(partial(attend_whole, kernel="plain"), *arrays, mask, 1.0)
    assert plain == 2 * 2 * 2 * LANES**2 * 8
    assert count_operations(partial(attend_whole, kernel="splash"), *arrays, mask, 1.0) == plain


MESHES = [
    pytest.param(
        "tpu-v5e-1",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("libtpu") is None, reason="compiling for a TPU needs the extra tpu"
        ),
    ),
    pytest.param(
        "gpu-1",
        marks=pytest.mark.skipif(not is_installed(), reason="compiling for a GPU needs the extra compile-gpu"),
    ),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_gradient_writes_no_scores(mesh, tmp_path):
    shape = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64 * HEADS, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, mesh, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [
        [int(size) for size in dims.split(",")]
        for dims in re.findall(r"\b(?:f32|bf16|pred|s8|s32)\[([\d,]+)\]", done.stdout)
    ]
    scores = [dims for dims in sizes if dims[-2:] == [LENGTH, LENGTH] and prod(dims) >= ROWS * HEADS * LENGTH**2]
    assert scores == []
