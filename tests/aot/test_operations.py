"""Counts of operations against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pargs_jax.aot.operations import count_operations

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16
LAYERS = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)


def stack(layers, x, wrap=lambda f: f):
    return jax.lax.scan(wrap(lambda x, w: (jnp.tanh(x @ w), None)), x, layers)[0].sum()


def test_a_product_counts_two_operations_a_multiply_add():
    assert count_operations(jnp.matmul, X, W) == PRODUCT
    assert count_operations(jax.jit(lambda x, w: jnp.tanh(x @ w) + 1), X, W) == PRODUCT


def test_batched_products_count_every_batch():
    q = jax.ShapeDtypeStruct((3, 8, 4, 16), jnp.float32)
    scores = count_operations(lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k), q, q)
    assert scores == 2 * 3 * 4 * 8 * 8 * 16


def test_gradients_of_both_factors_are_two_more_products():
    gradient = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), argnums=(0, 1))
    assert count_operations(gradient, X, W) == 3 * PRODUCT


def test_a_scan_counts_every_step():
    assert count_operations(stack, LAYERS, X) == 5 * PRODUCT


def test_remat_adds_exactly_the_forward_pass_again():
    plain = count_operations(jax.grad(stack, argnums=(0, 1)), LAYERS, X)
    remat = count_operations(jax.grad(lambda w, x: stack(w, x, jax.checkpoint), argnums=(0, 1)), LAYERS, X)
    assert plain == 3 * 5 * PRODUCT
    assert remat - plain == 5 * PRODUCT


def test_the_most_expensive_branch_counts():
    def branches(x, w):
        return jax.lax.switch(1, [lambda: x @ w @ w, lambda: x @ w, lambda: x @ w @ w @ w])

    assert count_operations(branches, X, W) == 3 * PRODUCT
    assert count_operations(branches, X, W, choice=min) == PRODUCT


def test_the_more_expensive_of_two_branches_counts_whatever_the_choice():
    def branches(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x, lambda: x @ w)

    assert count_operations(branches, X, W, choice=min) == PRODUCT


def test_the_body_of_a_while_loop_counts_once():
    def loop(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    assert count_operations(loop, X, W) == PRODUCT


def test_custom_derivatives_count_as_the_function():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert count_operations(product, X, W) == PRODUCT
    assert count_operations(jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, W) == 3 * PRODUCT


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_counts_its_window_and_the_channels_of_a_group(groups):
    x = jax.ShapeDtypeStruct((2, 10, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 8 // groups, 12), jnp.float32)

    def convolve(x, kernel):
        dimensions = ("NHC", "HIO", "NHC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=dimensions, feature_group_count=groups
        )

    assert count_operations(convolve, x, kernel) == 2 * (2 * 10 * 12) * 3 * (8 // groups)


def test_a_shard_map_counts_all_its_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert count_operations(sharded, X, W) == PRODUCT
