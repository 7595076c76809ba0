"""Compiling for an H100 on a machine without one.

JAX can compile for a GPU that it knows only from a description, but some of its private functions insist on a real GPU.
They are replaced during the call; versions of JAX without them are refused with a one-line error. Normally XLA times
several kernels for each matrix product and picks one. It cannot do that here, so it takes its default.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pargs_jax.errors import InputError, first_line

if TYPE_CHECKING:
    import jax

NEEDS_EXTRA = "compiling for a GPU needs NVIDIA's compiler; install it with pip install 'pargs-jax[compile-gpu]'"


def prepare_compiler() -> None:
    """Tells XLA where NVIDIA's compiler is. Call this before JAX is imported. Raises InputError if it is missing."""
    folder = _toolkit()
    if folder is None:
        raise InputError(NEEDS_EXTRA)
    flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


def is_installed() -> bool:
    """Whether everything that compiling for a GPU needs is installed."""
    return _toolkit() is not None


def describe_h100() -> list[Any]:
    """One H100 as a device to compile for. Raises InputError if NVIDIA's compiler is missing, or if this version of JAX
    is not supported."""
    from jax.experimental import topologies

    if not is_installed():
        raise InputError(NEEDS_EXTRA)
    # XLA's description of it, from its `xla/backends/gpu/target_config/specs/h100_sxm.txtpb`.
    chip = (files("pargs_jax") / "assets" / "h100_sxm.txtpb").read_text()
    with _replaced("xla_bridge", "canonicalize_platform", _know_cuda):
        try:
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="h100", target_config=chip, topology="1x1x1"
            )
        except Exception as error:
            raise _other_jax(first_line(error)) from error
    return topology.devices


@contextmanager
def tracing_for_h100() -> Iterator[None]:
    """Lets programs be traced and lowered for `describe_h100()`, also those that call the host or cuDNN.

    For a host call, JAX asks for the GPU's client, which it then does not use; for flash attention, it asks for cuDNN's
    version, which it then does not run. Neither matters for inspecting the program. Raises InputError if this version
    of JAX is not supported.
    """
    with (
        _replaced("interpreters.mlir", "ModuleContext.get_backend", _no_client),
        _replaced("cudnn.fused_attention_stablehlo", "check_cudnn_version", _know_cudnn),
    ):
        yield


def lower_for_h100(program: Any, arguments: tuple[Any, ...]) -> "jax.stages.Lowered":
    """`program.lower(*arguments)` for arguments on `describe_h100()`.

    JAX passes the Python functions of host calls to the compiler, which needs a real GPU for them, so they are left
    out. Raises InputError if this version of JAX is not supported.
    """
    with tracing_for_h100():
        lowered = program.lower(*arguments)
    try:
        lowered._lowering.compile_args["host_callbacks"] = []
    except AttributeError as error:
        raise _other_jax(first_line(error)) from error
    return lowered


def _toolkit() -> Path | None:
    """The folder of NVIDIA's compiler, if it and JAX's CUDA plugin are installed."""
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia is None or importlib.util.find_spec("jax_cuda13_plugin") is None:
        return None
    for place in nvidia.submodule_search_locations or ():
        folder = Path(place) / "cu13"
        if (folder / "bin" / "ptxas").exists() and (folder / "nvvm" / "libdevice").exists():
            return folder
    return None


def _know_cuda(resolve: Callable[[str], str]) -> Callable[[str], str]:
    """Accepts "cuda" as a platform name, which JAX refuses on a machine without a GPU."""
    return lambda platform: platform if platform == "cuda" else resolve(platform)


def _no_client(_: Any) -> Callable[..., None]:
    return lambda *_, **__: None


def _know_cudnn(_: Any) -> Callable[[], int]:
    """The version in the chip's description."""
    return lambda: 91000


@contextmanager
def _replaced(module: str, path: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces a private function of JAX, `path` in `jax._src.<module>`, with the result of `change`."""
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(f"jax._src.{module}"))
        before = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise _other_jax(first_line(error)) from error
    setattr(owner, name, change(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _other_jax(reason: str) -> InputError:
    import jax

    return InputError(
        f"compiling for a GPU does not work with jax {jax.__version__} ({reason}); it works with jax 0.10.2"
    )
