"""Compiling for an H100 on a machine without one.

JAX can compile for a GPU that it knows by a description only, but its public functions insist on a GPU. The one private
function of JAX that stands in the way is replaced while the description is read. Nothing is timed when there is no GPU,
so the choice among kernels for a matrix product is XLA's default, not the best.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pargs_jax.errors import InputError, first_line

NEEDS_EXTRA = "--compile-only for a GPU needs NVIDIA's compiler, which comes with: pip install 'pargs-jax[compile-gpu]'"

# What XLA has to know of the chip: its `xla/backends/gpu/target_config/specs/h100_sxm.txtpb`.
H100_SXM = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
"""


def prepare_compiler() -> None:
    """Tells XLA where NVIDIA's compiler is. To be called before JAX is imported. Raises InputError if it is missing."""
    folder = _toolkit()
    if folder is None:
        raise InputError(NEEDS_EXTRA)
    flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


def is_installed() -> bool:
    """Whether what compiling for a GPU needs is here."""
    return _toolkit() is not None


def describe_h100() -> list[Any]:
    """One H100 as a device to compile for. Raises InputError if JAX is not one that this works with."""
    import jax
    from jax.experimental import topologies

    try:
        with _cuda_is_known():
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="h100", target_config=H100_SXM, topology="1x1x1"
            )
    except Exception as error:
        raise InputError(
            f"jax {jax.__version__} cannot describe an H100 that is not here ({first_line(error)}); jax 0.10.2 can"
        ) from error
    return topology.devices


def _toolkit() -> Path | None:
    """The folder of NVIDIA's compiler, if it and JAX's plugin for CUDA are installed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None or importlib.util.find_spec("nvidia") is None:
        return None
    for place in importlib.util.find_spec("nvidia").submodule_search_locations or ():
        folder = Path(place) / "cu13"
        if (folder / "bin" / "ptxas").exists() and (folder / "nvvm" / "libdevice").exists():
            return folder
    return None


@contextmanager
def _cuda_is_known() -> Iterator[None]:
    """Lets JAX take "cuda" for the name of a platform, which it does not where there is no GPU."""
    from jax._src import xla_bridge

    resolve = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: platform if platform == "cuda" else resolve(platform)
    try:
        yield
    finally:
        xla_bridge.canonicalize_platform = resolve
