"""Compiles a program for devices that need not be there, and reports its needs."""

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import jax

from pargs_jax.aot.chips import GIB, Chip
from pargs_jax.aot.collectives import CollectiveTraffic, collective_bytes
from pargs_jax.aot.kernels import Launches, count_launches, count_step_launches

SIZE_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([BKMGT]?)"
# The two messages of the TPU compiler when memory runs out: before it lays out memory, and after.
BEFORE_LAYOUT = re.compile(rf"total memory required for HLO temporaries \({SIZE}\) exceeds available HBM \({SIZE}\)")
AFTER_LAYOUT = re.compile(rf"Used {SIZE} of {SIZE} hbm")
ALLOCATION = re.compile(rf"^\s*\d+\. Size: {SIZE}.*?^\s*Shape: ([^\s{{]+)", re.MULTILINE | re.DOTALL)


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: int
    outputs: int
    aliased: int
    """The part of the outputs that reuses the memory of donated arguments."""
    temporaries: int
    program: int

    @property
    def peak(self) -> int:
        """The memory that a run reserves. Temporaries are one block, including gaps between buffers."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


class Allocation(NamedTuple):
    """A buffer that the compiler lists when memory runs out."""

    bytes: float
    shape: str


class Step(NamedTuple):
    """One step of a program, to compare the bytes that it moves with the least possible."""

    least_bytes: float
    """The bytes that any program for the step must read or write, on all devices together."""
    is_turn_of_loop: bool = False
    """Whether a step is one iteration of the program's main loop; if not, it is the whole program."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The needs of one program.

    If the compiler ran out of memory, there is no program: `memory` and `traffic` are None, and `largest` holds the
    allocations that it listed, if any.
    """

    chip: Chip
    devices: int
    operations: tuple[float, float]
    """Of the whole program, on all devices together; a multiply-add is two. The least and the most, depending on which
    width is chosen where there are several."""
    peak_bytes: float
    limit_bytes: float
    compile_seconds: float
    memory: Memory | None = None
    traffic: tuple[CollectiveTraffic, CollectiveTraffic] | None = None
    """Bytes that devices send to each other; the least and the most, as for `operations`."""
    largest: tuple[Allocation, ...] = ()
    argument_reads: int = 1
    """How often a run reads its arguments: decoding reads the weights for every token."""
    step: Step | None = None
    launches: tuple[Launches, Launches] | None = None
    """A step's kernels and bytes on a GPU; the least and the most, as for `operations`. None for a TPU."""

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.peak_bytes <= self.limit_bytes

    def seconds(self, most: bool = False) -> dict[str, float]:
        """The time of one run for each resource, as if it were the only limit and ran at its peak rate. `most` says
        whether to take the most that a run may need, or the least.

        `memory` counts only certain traffic: arguments are read `argument_reads` times and outputs are written once.
        Temporaries, such as caches, are not included.
        """
        bounds = {"operations": self.operations[most] / self.devices / self.chip.operations_per_second}
        if self.memory is not None:
            moved = self.argument_reads * self.memory.arguments + self.memory.outputs
            bounds["memory"] = moved / self.chip.memory_bytes_per_second
        if self.traffic is not None:
            bounds["interconnect"] = self.traffic[most].total / self.chip.interconnect_bytes_per_second
        return bounds

    def run_seconds(self, most: bool = False) -> float:
        """A lower bound on the time of one run: that of its slowest resource."""
        return max(self.seconds(most).values())

    def as_row(self) -> dict[str, str]:
        """The report as cells of a table, by column. Memory is per device; operations are those of all devices."""
        row = {
            "fits": "yes" if self.fits else "no",
            "peak GiB": _gib(self.peak_bytes),
            "limit GiB": _gib(self.limit_bytes),
        }
        for part in Memory._fields:
            row[f"{part} GiB"] = "" if self.memory is None else _gib(getattr(self.memory, part))
        row["operations"] = _range(*self.operations)
        least, most = self.traffic or (CollectiveTraffic({}, 0),) * 2
        is_floor = most.loops_of_unknown_length > 0
        kinds = (f"{kind} {_range(least.sent.get(kind, 0.0) / 1e9, most.sent[kind] / 1e9)}" for kind in most.sent)
        row["sent GB"] = "at least " * is_floor + ", ".join(kinds)
        # Without a program only the operations are known, and they alone do not bound the time.
        times = _range(*(self.run_seconds(most) * 1e3 for most in (False, True)))
        row["ms at peak rates"] = "" if self.memory is None else times
        row |= self._step_cells()
        row["compile s"] = f"{self.compile_seconds:.0f}"
        return row

    def _step_cells(self) -> dict[str, str]:
        """A step's kernels, and its bytes compared with the least possible; empty for a TPU."""
        if self.launches is None or self.step is None:
            return {}
        least, most = self.launches
        needed = self.step.least_bytes / self.devices
        return {
            "kernels a step": _range(least.kernels, most.kernels, ",.0f"),
            "GB a step": _range(least.bytes / 1e9, most.bytes / 1e9),
            "least GB a step": f"{needed / 1e9:.3g}",
            "times the least": _range(least.bytes / needed, most.bytes / needed),
        }

    def advice(self, options: Iterable[str]) -> list[str]:
        """Lines that say by how much the program does not fit, what takes the memory, and what to try; none if it fits.

        Args:
            options: changes that the caller can make, the most helpful first, as whole phrases.
        """
        if self.fits:
            return []
        over = self.peak_bytes - self.limit_bytes
        lines = [
            f"needs {_gib(self.peak_bytes)} GiB a device, {_gib(over)} GiB more than the {_gib(self.limit_bytes)} GiB "
            f"of a {self.chip.name}"
        ]
        if self.memory is not None:
            part = max(("arguments", "temporaries"), key=lambda name: getattr(self.memory, name))
            lines.append(f"most of it: {part}, {_gib(getattr(self.memory, part))} GiB")
        lines.extend(f"large: {_gib(item.bytes)} GiB, {item.shape}" for item in self.largest)
        lines.extend(f"try: {option}" for option in options)
        return lines


def compile_report(
    lowered: jax.stages.Lowered,
    *,
    chip: Chip,
    devices: int,
    operations: tuple[float, float],
    argument_reads: int = 1,
    step: Step | None = None,
) -> Report:
    """Compiles a program and measures its needs.

    Args:
        lowered: a lowered jitted function, on abstract arrays that are sharded over the devices of a topology.
        chip: the type of the devices.
        devices: the number of devices.
        operations: those of the whole program, the least and the most (`count_operations` with `min` and `max`).
        argument_reads: how often a run reads its arguments.
        step: describes a step of the program; on a GPU its kernels and bytes are counted.

    Raises jax.errors.JaxRuntimeError for all compiler errors except a lack of device memory, which is reported.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        shortage = read_shortage(str(error))
        if shortage is None:
            raise
        used, limit, largest = shortage
        seconds = time.perf_counter() - start
        return Report(chip, devices, operations, used, limit, seconds, largest=largest, argument_reads=argument_reads)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    text = compiled.as_text()
    traffic = collective_bytes(text, min), collective_bytes(text, max)
    launches = None
    if chip.is_gpu and step is not None:
        count = count_step_launches if step.is_turn_of_loop else count_launches
        launches = count(text, choice=min), count(text, choice=max)
    return Report(
        chip, devices, operations, memory.peak, chip.memory_bytes, seconds, memory, traffic, (), argument_reads, step,
        launches,
    )  # fmt: skip


def read_shortage(message: str) -> tuple[float, float, tuple[Allocation, ...]] | None:
    """Bytes needed, bytes available, and the largest allocations, from the message of a TPU compiler that ran out of
    memory; None for other messages. Sizes are rounded as they are printed."""
    found = BEFORE_LAYOUT.search(message) or AFTER_LAYOUT.search(message)
    if found is None:
        return None
    used, limit = _size(found[1], found[2]), _size(found[3], found[4])
    largest = (Allocation(_size(number, unit), shape) for number, unit, shape in ALLOCATION.findall(message))
    return used, limit, tuple(largest)


def _size(number: str, unit: str) -> float:
    return float(number) * SIZE_UNITS[unit]


def _range(least: float, most: float, form: str = ".3g") -> str:
    low, high = format(least, form), format(most, form)
    return low if low == high else f"{low} to {high}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
