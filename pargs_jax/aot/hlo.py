"""Parses the text of a compiled program (HLO) into instructions, as far as counting needs it."""

import re
from typing import NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r" *([\w\-]+)\(")
NAME = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(arguments), attributes`."""

    name: str
    is_root: bool
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return NAME.findall(self.arguments)

    def attribute(self, key: str) -> str:
        """The value of a one-word attribute, without the `%` of a name; "" if there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    def computations(self, *keys: str) -> list[str]:
        """The computations that attributes name, one or a list in braces each."""
        values = re.findall(rf"\b(?:{'|'.join(keys)})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return [name for value in values for name in NAME.findall(value)]


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


class Module(NamedTuple):
    """A whole program."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def parse_module(text: str) -> Module:
    """Parses the result of `compiled.as_text()`. Raises ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = ""
    instructions: Computation = {}
    for line in text.splitlines():
        if start := INSTRUCTION.match(line):
            instruction = _parse_instruction(line, start)
            instructions[instruction.name] = instruction
        elif header := HEADER.match(line):
            instructions = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    devices = 1
    for count in counts:
        devices *= int(count)
    return Module(computations, entry, devices)


def root(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def shape_bytes(shape: str) -> float:
    """Bytes of an array's data, or of all arrays of a tuple, without the layout's padding."""
    return sum(_array_bytes(*array) for array in ARRAY.findall(shape))


def _array_bytes(kind: str, bits: str, dimensions: str) -> float:
    if kind == "token":
        return 0.0
    size = int(bits or 8) / 8  # only `pred` has no number; it takes one byte
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def _parse_instruction(line: str, start: re.Match[str]) -> Instruction:
    position = start.end()
    end = _closing(line, position) if line[position] == "(" else line.index(" ", position)
    shape = line[position:end]
    opcode = OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"not an instruction: {line.strip()[:80]}")
    close = _closing(line, opcode.end() - 1)
    return Instruction(start[2], bool(start[1]), shape, opcode[1], line[opcode.end() : close - 1], line[close:])


def _closing(line: str, position: int) -> int:
    """The position after the parenthesis that closes the one at `position`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, position):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {line.strip()[:80]}")
