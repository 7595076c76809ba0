"""Published performance numbers of single chips: each TPU generation, and an H100 (SXM)."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One chip: its memory, and its peak rates, which no program reaches."""

    name: str
    operations_per_second: float
    """Dense bf16 matrix products; a multiply-add is two operations."""
    memory_bytes: float
    """Memory that a program may use. On a TPU, the limit that the compiler reports when exceeded; on a GPU, all
    memory."""
    memory_bytes_per_second: float
    interconnect_bytes_per_second: float
    """All links of a chip together. A ring over one axis of a torus uses two of a v4's six."""
    is_gpu: bool = False


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 30.75 * GIB, 1.2e12, 300e9),
        Chip("v5e", 197e12, 15.75 * GIB, 0.82e12, 200e9),
        Chip("v5p", 459e12, 95.74 * GIB, 2.765e12, 600e9),
        Chip("v6e", 918e12, 31.25 * GIB, 1.64e12, 448e9),
        Chip("H100", 989e12, 84942979072, 3.35e12, 900e9, is_gpu=True),
    )
}
"""Chips by name."""
