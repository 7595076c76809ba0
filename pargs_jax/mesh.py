"""The devices that a run uses, and their arrangement.

A mesh has three axes. `data` holds copies of the model, each with its own rows. `fsdp` splits rows and weights, and
gathers the weights layer by layer. `tensor` splits the matrices of every layer. `pargs_jax.sharding` says how each
array is split.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from pargs_jax.aot.gpu import describe_h100
from pargs_jax.config import TrainConfig
from pargs_jax.errors import InputError, first_line
from pargs_jax.processes import start_processes

AXES = ("data", "fsdp", "tensor")
Task = Literal["train", "decode"]

MOST_VIRTUAL_DEVICES = 1024
WIDEST_TENSOR = 8
"""By default decoding splits matrices over at most this many devices; with more, steps mostly wait for messages."""


_NO_DEVICES = (RuntimeError, AssertionError)
"""What JAX raises where a platform's devices are not here; the latter where its plugin is not installed."""
_COUNT = re.compile("[1-9][0-9]{0,8}")


class TpuGeneration(NamedTuple):
    """How slices of one kind of TPU are named and built.

    Attributes:
        kind: JAX's name for such a device.
        cores_per_chip: slices of v4 and v5p are named after their cores, others after their chips. A device is a chip.
        dimensions: the number of dimensions of the chips' grid.
        sizes: the sizes of the slices that exist, in chips.
    """

    kind: str
    cores_per_chip: int
    dimensions: int
    sizes: tuple[int, ...]


TPUS = {
    "v4": TpuGeneration("TPU v4", 2, 3, (4, 8, 16, 32, 64, 128, 256)),
    "v5e": TpuGeneration("TPU v5 lite", 1, 2, (1, 4, 8, 16, 32, 64, 128, 256)),
    "v5p": TpuGeneration("TPU v5", 2, 3, (4, 8, 16, 32, 64, 128, 256)),
    "v6e": TpuGeneration("TPU v6 lite", 1, 2, (1, 4, 8, 16, 32, 64, 128, 256)),
}


@dataclasses.dataclass(frozen=True)
class MeshRequest:
    """The parsed option `mesh`.

    Attributes:
        text: the option's text.
        platform: `cpu`, `gpu`, `tpu`, or None for JAX's default.
        devices: the number of devices; None for all. (`gpu`: at most that many; for the others, a slice of exactly that
            size.)
        tpu: the generation of a TPU slice.
        axes: the sizes of the axes that were given.
    """

    text: str
    platform: str | None = None
    devices: int | None = None
    tpu: str | None = None
    axes: tuple[tuple[str, int], ...] = ()

    def shape(self, devices: int, task: Task) -> tuple[int, int, int]:
        """The sizes of `AXES` for this many devices.

        By default, training puts all devices on `fsdp`. Decoding puts a power of two, up to `WIDEST_TENSOR`, on
        `tensor` and the rest on `data`. Raises InputError if the given axes do not multiply to the number of devices.
        """
        if self.axes:
            sizes = dict(self.axes)
            asked = math.prod(sizes.values())
            if asked != devices:
                product = " x ".join(f"{name}={size}" for name, size in self.axes)
                raise InputError(f"mesh {self.text}: {product} needs {asked} devices, but there are {devices}")
            return tuple(sizes.get(axis, 1) for axis in AXES)
        if task == "train":
            return 1, devices, 1
        tensor = math.gcd(devices, WIDEST_TENSOR)
        return devices // tensor, 1, tensor


def presets() -> list[str]:
    """The names of all presets, except GPUs and virtual devices in other numbers."""
    slices = [f"tpu-{name}-{chips * tpu.cores_per_chip}" for name, tpu in TPUS.items() for chips in tpu.sizes]
    return ["auto", "cpu", "cpu-4", "gpu-1", "gpu-8", *slices]


def parse_mesh(text: str) -> MeshRequest:
    """Reads the option `mesh`: a preset, axes (`data=2,fsdp=2`), or a preset and axes (`tpu-v4-8,fsdp=2,tensor=2`).

    Raises InputError, with the nearest preset, for anything else.
    """
    words = [word.strip() for word in text.split(",")]
    name = "auto" if "=" in words[0] else words.pop(0)
    axes: dict[str, int] = {}
    for word in words:
        axis, _, size = word.partition("=")
        if axis not in AXES or not _COUNT.fullmatch(size) or axis in axes:
            raise InputError(
                f"mesh {text}: {word!r} is not an axis; axes are {', '.join(AXES)}, each once, such as 'data=2,fsdp=4'"
            )
        axes[axis] = int(size)
    request = MeshRequest(text, axes=tuple(axes.items()))
    if name == "auto":
        return request
    if found := re.fullmatch(rf"(cpu|gpu)(?:-({_COUNT.pattern}))?", name):
        count = int(found[2]) if found[2] else None
        return dataclasses.replace(request, platform=found[1], devices=count)
    if name in presets():
        _, generation, size = name.split("-")
        chips = int(size) // TPUS[generation].cores_per_chip
        return dataclasses.replace(request, platform="tpu", devices=chips, tpu=generation)
    nearest = difflib.get_close_matches(name, presets(), n=1, cutoff=0.0)[0]
    raise InputError(f"mesh {text}: {name!r} is not known; did you mean {nearest}? (or auto, cpu-N, gpu-N, or axes)")


def start(config: Any) -> Mesh:
    """The mesh that a command's config asks for by its `mesh`, `compile_cache` and, if it can have several processes,
    `distributed` and `processes`. Connects with the other processes, if there are any, and opens the cache of compiled
    programs."""
    open_compile_cache(config.compile_cache)
    processes: int | None = 1
    if getattr(config, "distributed", False):
        start_processes(config.processes)
        processes = config.processes.count
    return make_mesh(config.mesh, "train" if isinstance(config, TrainConfig) else "decode", processes=processes)


def open_compile_cache(folder: str | None) -> None:
    """Makes JAX keep compiled programs in a folder, if one is given. Raises InputError if it cannot be used."""
    if folder is not None:
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"compile_cache {folder}: cannot be created ({error.strerror})") from error
        if not os.access(path, os.W_OK):
            raise InputError(f"compile_cache {folder}: cannot be written")
        jax.config.update("jax_compilation_cache_dir", folder)


def make_mesh(text: str, task: Task, *, processes: int | None = 1) -> Mesh:
    """The mesh for a text such as `tpu-v4-8`, of devices that are here.

    `cpu-N` makes N virtual devices if JAX has not looked for devices yet. They are divided among all processes, whose
    number must then be known (not None). Raises InputError if the machine does not match, or if a process would have no
    device.
    """
    request = parse_mesh(text)
    devices = _find_devices(request, processes)
    return _arranged(request.shape(len(devices), task), devices)


def make_topology_mesh(text: str, task: Task) -> Mesh:
    """The mesh of a TPU slice, or of one H100 (`gpu-1`), that is not here; for compiling only. Needs libtpu, or
    NVIDIA's compiler (`pargs_jax.aot.gpu`).

    Raises InputError for other requests, and if the compiler is missing or cannot describe the devices.
    """
    request = parse_mesh(text)
    if (request.platform, request.devices) == ("gpu", 1):
        return _arranged(request.shape(1, task), describe_h100())
    if request.tpu is None or request.devices is None:
        raise InputError(f"mesh {text}: compile_only needs a TPU slice, such as tpu-v4-8, or one H100, gpu-1")
    from jax.experimental import topologies

    tpu = TPUS[request.tpu]
    grid = _grid(request.devices, tpu.dimensions)
    options: dict[str, Any] = {
        "chips_per_host_bounds": (*(min(side, 2) for side in grid[:2]), 1),
        "num_slices": 1,
        "wrap": (False,) * 3,
    }
    if tpu.cores_per_chip == 2:
        options["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{request.tpu}:{'x'.join(map(str, grid))}", **options
        )
    except Exception as error:
        raise InputError(
            f"mesh {text}: libtpu cannot describe it ({first_line(error)}); "
            "install it with pip install 'pargs-jax[tpu]'"
        ) from error
    return _arranged(request.shape(len(topology.devices), task), topology.devices)


@contextlib.contextmanager
def ensured_mesh() -> Iterator[Mesh]:
    """The current mesh (`jax.set_mesh`). If there is none, a mesh of one device is set for the duration."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        yield mesh
        return
    with jax.set_mesh(_arranged((1, 1, 1), jax.local_devices()[:1])) as mesh:
        yield jax.sharding.get_mesh()


def _arranged(shape: tuple[int, ...], devices: Any) -> Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _grid(chips: int, dimensions: int) -> tuple[int, ...]:
    """The sides of a slice as they are sold: powers of two, as equal as possible."""
    sides = [1] * dimensions
    while math.prod(sides) < chips:
        sides[sides.index(min(sides))] *= 2
    return tuple(sorted(sides, reverse=dimensions == 3 and chips == 4))


def _find_devices(request: MeshRequest, processes: int | None) -> list[jax.Device]:
    if request.platform == "cpu":
        _ask_for_virtual_devices(request, processes)
    try:
        devices = jax.devices(request.platform)
    except _NO_DEVICES as error:
        raise _not_here(request) from error
    if request.tpu is not None:
        if len(devices) != request.devices or devices[0].device_kind != TPUS[request.tpu].kind:
            raise _not_here(request)
        return devices
    wanted = request.devices or (math.prod(size for _, size in request.axes) if request.axes else len(devices))
    if len(devices) < wanted or (jax.process_count() > 1 and len(devices) != wanted):
        raise _not_here(request)
    return devices[:wanted]


def prepare_virtual_devices(count: int) -> None:
    """Keeps virtual devices from deadlocking. Call this before JAX looks for devices.

    A device that waits for others in a collective blocks a thread, and XLA makes only as many threads as there are
    cores. XLA also gives up after 40 seconds, which kills healthy runs on a busy machine.
    """
    os.environ.setdefault("NPROC", str(4 * count))
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_collective_call" not in flags:
        limits = "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300"
        limits += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        os.environ["XLA_FLAGS"] = f"{flags} {limits}".strip()


def _ask_for_virtual_devices(request: MeshRequest, processes: int | None) -> None:
    wanted = request.devices or math.prod(size for _, size in request.axes)
    if processes is None and wanted > 1:
        raise InputError(f"mesh {request.text}: virtual devices of several processes need the option processes.count")
    if wanted > MOST_VIRTUAL_DEVICES:
        raise InputError(f"mesh {request.text}: needs {wanted} virtual devices, must be at most {MOST_VIRTUAL_DEVICES}")
    jax.config.update("jax_platforms", "cpu")
    # The devices exist already, and their number is fixed: _find_devices checks whether they suffice.
    with contextlib.suppress(RuntimeError):
        if wanted > 1:
            prepare_virtual_devices(wanted)
            jax.config.update("jax_num_cpu_devices", -(-wanted // processes))


def _not_here(request: MeshRequest) -> InputError:
    try:
        devices = jax.devices()
    except _NO_DEVICES as error:
        asked = os.environ.get("JAX_PLATFORMS")
        variable = f" of JAX_PLATFORMS={asked}" if asked else ""
        raise InputError(f"mesh {request.text}: JAX finds no devices{variable} ({first_line(error)})") from error
    kinds = sorted({device.device_kind for device in devices})
    here = f"{len(devices)} x {', '.join(kinds)}"
    if request.tpu is not None:
        advice = "run on every host of that slice (distributed), or only compile for it (compile_only)"
    else:
        advice = "use mesh auto for the devices of this machine"
    return InputError(f"mesh {request.text}: this machine has {here}; {advice}")
