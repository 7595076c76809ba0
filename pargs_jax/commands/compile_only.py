"""What `--compile-only` shares among commands: a program compiled for devices that are not here, and its report."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pargs_jax.aot.chips import CHIPS
from pargs_jax.aot.gpu import lower_for_h100, tracing_for_h100
from pargs_jax.aot.operations import count_operations
from pargs_jax.aot.report import Report, Step, compile_report
from pargs_jax.mesh import parse_mesh
from pargs_jax.sharding import row_spec


def abstract_rows(mesh: Mesh, count: int, *widths: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    """An array with so many rows, split over the mesh as rows are."""
    sharding = NamedSharding(mesh, row_spec(mesh, count))
    return jax.ShapeDtypeStruct((count, *widths), dtype, sharding=sharding)


def bytes_of(tree: Any) -> float:
    """Bytes of all arrays of a tree, which may be abstract."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def lower(mesh: Mesh, program: Any, arguments: tuple[Any, ...]) -> jax.stages.Lowered:
    """A program lowered for a mesh of devices that are not here."""
    with jax.set_mesh(mesh):
        if mesh.devices.flat[0].platform == "tpu":
            return program.lower(*arguments)
        return lower_for_h100(program, arguments)


def compile_and_print(
    mesh: Mesh,
    what: str,
    program: Any,
    arguments: tuple[Any, ...],
    *,
    name: str,
    step: Step,
    advice: Iterable[str],
    reads: int = 1,
    console: Console | None = None,
) -> Report:
    """Compiles a program and prints what it takes.

    Args:
        mesh: the devices, which need not be here.
        what: the program in words.
        program: a jitted function, or what can be called and lowered like one.
        arguments: abstract arrays with shardings.
        name: the mesh as `--mesh` names it.
        step: what a step of the program is, and the bytes that it has to move.
        advice: what to try where the program does not fit, most helpful first.
        reads: how often a run reads its arguments.
        console: what the report is printed on.
    """
    console = console or Console(markup=False, emoji=False)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(f"{name}: {mesh.size} devices ({axes}); {what}", highlight=False)
    with console.status("compiling"):
        traced = nullcontext() if mesh.devices.flat[0].platform == "tpu" else tracing_for_h100()
        with jax.set_mesh(mesh), traced:
            least, most = (count_operations(program, *arguments, choice=choice) for choice in (min, max))
        report = compile_report(
            lower(mesh, program, arguments),
            chip=CHIPS[parse_mesh(name).tpu or "H100"],
            devices=mesh.size,
            operations=(least, most),
            argument_reads=reads,
            step=step,
        )
    table = Table(box=SIMPLE, show_header=False)
    for cell, value in report.as_row().items():
        table.add_row(cell, value)
    console.print(table)
    for line in report.advice(advice):
        console.print(line, highlight=False, style="yellow")
    return report
