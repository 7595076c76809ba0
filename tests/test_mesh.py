"""The option `mesh`: what it accepts, what it makes of it, and how it refuses."""

import jax
import pytest

from pargs_jax.errors import InputError
from pargs_jax.mesh import AXES, ensured_mesh, make_mesh, parse_mesh, presets


@pytest.mark.parametrize(
    ("text", "task", "shape"),
    [
        ("cpu-4", "train", (1, 4, 1)),
        ("cpu-4", "decode", (1, 1, 4)),
        ("cpu-1", "train", (1, 1, 1)),
        ("cpu-2,data=2", "decode", (2, 1, 1)),
        ("data=2,tensor=2", "train", (2, 1, 2)),
        ("auto", "train", (1, 4, 1)),
    ],
)
def test_a_mesh_has_the_shape_that_was_asked_for(text, task, shape):
    mesh = make_mesh(text, task)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape


def test_slices_are_named_after_cores_or_chips_as_they_are_sold():
    assert {name: parse_mesh(name).devices for name in ("tpu-v4-8", "tpu-v5e-8", "tpu-v5p-8", "tpu-v4-512")} == {
        "tpu-v4-8": 4, "tpu-v5e-8": 8, "tpu-v5p-8": 4, "tpu-v4-512": 256,
    }  # fmt: skip
    assert parse_mesh("tpu-v4-512").shape(256, "decode") == (32, 1, 8)
    assert all(parse_mesh(name) for name in presets())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu-v4-9", "'tpu-v4-9' is not known; did you mean tpu-v4-8? (or auto, cpu-N, gpu-N, or axes)"),
        ("gpu8", "'gpu8' is not known; did you mean gpu-8? (or auto, cpu-N, gpu-N, or axes)"),
        ("cpu-4,model=2", "'model=2' is not an axis; axes are data, fsdp, tensor, each once, such as 'data=2,fsdp=4'"),
        ("data=2,data=2", "'data=2' is not an axis; axes are data, fsdp, tensor, each once, such as 'data=2,fsdp=4'"),
        ("cpu-4,fsdp=3", "fsdp=3 needs 3 devices, but there are 4"),
        ("tpu-v4-8", "this machine has 4 x cpu; run on every host of that slice (distributed), or only compile "
         "for it (compile_only)"),
        ("gpu-8", "this machine has 4 x cpu; use mesh auto for the devices of this machine"),
        ("cpu-64", "this machine has 4 x cpu; use mesh auto for the devices of this machine"),
        ("cpu-100000000", "needs 100000000 virtual devices, must be at most 1024"),
        ("cpu,data=5000,fsdp=5000", "needs 25000000 virtual devices, must be at most 1024"),
        ("data=" + "9" * 5000, f"'data={'9' * 5000}' is not an axis; axes are data, fsdp, tensor, each once, such as "
         "'data=2,fsdp=4'"),
    ],
)  # fmt: skip
def test_impossible_meshes_are_one_line(text, message):
    with pytest.raises(InputError) as caught:
        make_mesh(text, "train")
    assert str(caught.value) == f"mesh {text}: {message}"


def test_where_no_mesh_is_set_one_device_is_used():
    assert jax.sharding.get_mesh().empty
    with ensured_mesh() as mesh:
        assert mesh.size == 1
        assert jax.sharding.get_mesh() == mesh
        with ensured_mesh() as same:
            assert same == mesh
    assert jax.sharding.get_mesh().empty


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to initialize backend 'cuda'\nmany lines"), "Unable to initialize backend 'cuda'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_platform_that_is_not_here_is_one_line(monkeypatch, error, reason):
    def devices(platform=None):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError) as caught:
        make_mesh("auto", "train")
    assert str(caught.value) == f"mesh auto: JAX finds no devices of JAX_PLATFORMS=cuda ({reason})"
