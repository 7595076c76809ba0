"""Fingerprints of arrays: the same on every mesh, and another one for every element that differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pargs_jax.mesh import make_mesh
from pargs_jax.training.fingerprints import fingerprints, fingerprints_on_devices


def of(x):
    (found,) = fingerprints({"x": jnp.asarray(x)}).values()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_bit_and_its_place_count(dtype):
    x = np.arange(24).reshape(2, 3, 4) % 7
    seen = {of(jnp.asarray(x, dtype))}
    for index in np.ndindex(x.shape):
        other = x.copy()
        other[index] = 0 if x[index] else 1
        seen.add(of(jnp.asarray(other, dtype)))
    assert len(seen) == 25
    swapped = x[:, :, ::-1]
    assert of(jnp.asarray(swapped, dtype)) not in seen
    assert of(jnp.ones(5, dtype)) != of(jnp.ones(6, dtype))


def test_bits_that_mean_the_same_number_differ():
    assert of(np.float32([0.0])) != of(np.float32([-0.0]))
    assert of(np.float32([np.nan])) == of(np.float32([np.nan]))


def test_the_mesh_makes_no_difference():
    tree = {"a": jax.random.normal(jax.random.key(0), (8, 16)), "b": {"c": jnp.arange(4), "step": jnp.int32(3)}}
    expected = fingerprints(tree)
    assert expected.keys() == {"a", "b.c", "b.step"}
    for text in ("cpu-4", "data=2,tensor=2"):
        mesh = make_mesh(text, "train")
        with jax.set_mesh(mesh):
            spread = dict(tree, a=jax.device_put(tree["a"], NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))))
            assert fingerprints(spread) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_devices_compute_the_same_as_the_host(dtype):
    for shape in ((), (5,), (3, 4), (2, 3, 4)):
        x = jax.random.bernoulli(jax.random.key(0), shape=shape).astype(dtype)
        (found,) = fingerprints_on_devices({"x": x}).values()
        assert int(found) == of(x)
