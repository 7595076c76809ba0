"""Counts the kernels that a GPU program launches, and the bytes that they read and write, from its text."""

import math
from typing import NamedTuple

from pargs_jax.aot.collectives import Choice, loop_steps
from pargs_jax.aot.hlo import Computation, Instruction, Module, parse_module, root, shape_bytes

NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
VIEWS = ("bitcast", "reshape", "copy", "transpose", "convert")
READERS_OF_A_PART = ("dynamic-slice", "slice", "gather")
WRITERS_OF_A_PART = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that write into their first operand in place, and the number of the operand that they write."""


class Launches(NamedTuple):
    """The work of a GPU for a program, or for one step of it."""

    kernels: float
    """Kernels, copies and library calls, which run one after another."""
    bytes: float
    """The bytes that they read and write: each kernel's inputs and outputs, as if the chip cached nothing. If a kernel
    reads or writes only a part of an array, only that part counts."""

    def __add__(self, other: object) -> "Launches":
        return Launches(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "Launches":
        return Launches(self.kernels * count, self.bytes * count)


def count_launches(hlo_text: str, *, choice: Choice = max) -> Launches:
    """The launches of one run of a whole program. Loops count as often as they run, or once if that is not known.

    Args:
        hlo_text: `compiled.as_text()` of a program for a GPU.
        choice: `max` or `min`: which branch of a conditional counts, by its bytes.
    """
    module = parse_module(hlo_text)
    return _Count(module, choice).of(module.entry)


def count_step_launches(hlo_text: str, *, choice: Choice = max) -> Launches:
    """The launches in one iteration of the program's main loop: the loop of its entry that moves the most bytes. Raises
    ValueError if there is no loop."""
    module = parse_module(hlo_text)
    count = _Count(module, choice)
    entry = module.computations[module.entry]
    loops = [instruction for instruction in entry.values() if instruction.opcode == "while"]
    if not loops:
        raise ValueError("the program has no loop, so it has no step")
    turns = {loop.name: count.turn(loop) for loop in loops}
    main = max(loops, key=lambda loop: turns[loop.name].bytes * (loop_steps(loop, entry, module) or 1))
    return turns[main.name]


class _Count:
    """A walk through a module's computations; each is counted once."""

    def __init__(self, module: Module, choice: Choice) -> None:
        self.module = module
        self.choice = choice
        self.counted: dict[str, Launches] = {}

    def of(self, name: str) -> Launches:
        if name not in self.counted:
            computation = self.module.computations[name]
            total = Launches(0, 0)
            for instruction in computation.values():
                total += self._instruction(instruction, computation)
            self.counted[name] = total
        return self.counted[name]

    def turn(self, loop: Instruction) -> Launches:
        """One iteration of a loop, its condition included."""
        return self.of(loop.attribute("body")) + self.of(loop.attribute("condition"))

    def _instruction(self, instruction: Instruction, computation: Computation) -> Launches:
        opcode = instruction.opcode
        if opcode in NO_KERNEL or opcode.endswith(("-done", "-update")):
            return Launches(0, 0)
        if opcode == "while":
            return self.turn(instruction).times(loop_steps(instruction, computation, self.module) or 1)
        if opcode == "conditional":
            branches = instruction.computations("branch_computations", "true_computation", "false_computation")
            return self.choice((self.of(branch) for branch in branches), key=lambda launches: launches.bytes)
        if opcode in ("call", "async-start"):
            return sum((self.of(name) for name in instruction.computations("to_apply", "calls")), Launches(0, 0))
        shapes = [computation[name].shape for name in instruction.operands]
        if opcode == "fusion":
            fused = self.module.computations[instruction.attribute("calls")]
            return Launches(1, self._read(fused, shapes) + self._written(fused, root(fused)))
        whole = math.fsum(map(shape_bytes, shapes))
        if opcode in READERS_OF_A_PART:
            return Launches(1, 2 * shape_bytes(instruction.shape) + whole - shape_bytes(shapes[0]))
        if opcode in WRITERS_OF_A_PART:
            return Launches(1, 2 * shape_bytes(shapes[WRITERS_OF_A_PART[opcode]]))
        return Launches(1, whole + shape_bytes(instruction.shape))

    def _read(self, fused: Computation, shapes: list[str]) -> float:
        """Bytes that a fused computation reads from operands of these shapes."""
        parameters = {int(x.arguments): x for x in fused.values() if x.opcode == "parameter"}
        return math.fsum(
            self._read_of(fused, parameters[number].name, shape_bytes(shape)) for number, shape in enumerate(shapes)
        )

    def _read_of(self, fused: Computation, name: str, size: float) -> float:
        """Bytes read from one value in a fused computation: all of it, unless each use reads only a part."""
        parts = 0.0
        for user in fused.values():
            if name not in user.operands:
                continue
            is_source = user.operands[0] == name and name not in user.operands[1:]
            if user.opcode in READERS_OF_A_PART and is_source:
                parts += shape_bytes(user.shape)
            elif user.opcode in WRITERS_OF_A_PART and is_source:
                parts += 0.0
            elif user.opcode in VIEWS:
                parts += self._read_of(fused, user.name, shape_bytes(user.shape))
            elif user.opcode == "fusion":
                inner = self.module.computations[user.attribute("calls")]
                parameters = {int(x.arguments): x.name for x in inner.values() if x.opcode == "parameter"}
                numbers = [number for number, operand in enumerate(user.operands) if operand == name]
                parts += math.fsum(self._read_of(inner, parameters[number], size) for number in numbers)
            else:
                return size
        return min(parts, size)

    def _written(self, fused: Computation, result: Instruction) -> float:
        """Bytes that a fused computation writes."""
        if result.opcode == "tuple":
            return math.fsum(self._written(fused, fused[name]) for name in result.operands)
        if result.opcode in ("bitcast", "reshape"):
            return self._written(fused, fused[result.operands[0]])
        if result.opcode in WRITERS_OF_A_PART:
            return shape_bytes(fused[result.operands[WRITERS_OF_A_PART[result.opcode]]].shape)
        return shape_bytes(result.shape)
