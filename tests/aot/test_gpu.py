"""Compiling for a GPU that is not here: what is missing is said in one line."""

import os

import jax
import pytest

from pargs_jax.aot import expect_no_devices, gpu
from pargs_jax.errors import InputError


@pytest.fixture
def nothing_is_installed(monkeypatch):
    monkeypatch.setattr(gpu, "_toolkit", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which expect_no_devices changes


@pytest.mark.usefixtures("nothing_is_installed")
@pytest.mark.parametrize("call", [gpu.describe_h100, gpu.prepare_compiler, lambda: expect_no_devices("gpu-1")])
def test_the_extra_is_named_where_the_compiler_is_missing(call):
    with pytest.raises(InputError, match=r"\Acompiling for a GPU needs .* pip install 'pargs-jax\[compile-gpu\]'\Z"):
        call()


@pytest.mark.parametrize("place", [("no_such_module", "f"), ("xla_bridge", "no_such_function")])
def test_another_version_of_jax_is_one_line(place):
    with pytest.raises(InputError) as caught, gpu._replaced(*place, lambda before: before):
        pass
    message = str(caught.value)
    assert message.startswith(f"compiling for a GPU does not work with jax {jax.__version__} (")
    assert message.endswith("); it works with jax 0.10.2") and "\n" not in message


def test_private_functions_are_put_back():
    from jax._src import xla_bridge

    before = xla_bridge.canonicalize_platform
    with gpu._replaced("xla_bridge", "canonicalize_platform", gpu._know_cuda):
        assert xla_bridge.canonicalize_platform("cuda") == "cuda"
    assert xla_bridge.canonicalize_platform is before
