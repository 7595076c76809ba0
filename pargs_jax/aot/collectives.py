"""Bytes that a compiled program's devices send to each other, read from its text (HLO after all of XLA's passes)."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pargs_jax.aot.hlo import Computation, Instruction, Module, parse_module, root, shape_bytes

SENT_SHARE = {
    "all-gather": lambda n: n - 1.0,
    "all-reduce": lambda n: 2.0 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
"""The bytes that one device of a ring of n sends, as a share of its input bytes, by kind:

- all-gather: its own part to each of the others, `input (n-1)`, which is `output (n-1)/n`;
- reduce-scatter: `input (n-1)/n`, all parts but the one it keeps;
- all-reduce: a reduce-scatter, then an all-gather of the parts: `2 input (n-1)/n`;
- all-to-all: `input (n-1)/n`;
- collective-permute: `input`, from the devices that have a target.
"""


Choice = Callable[..., Counter[str]]


class CollectiveTraffic(NamedTuple):
    """Bytes that one device sends in one run of a program."""

    sent: dict[str, float]
    """In bytes, by kind of collective; kinds that do not occur are left out."""
    loops_of_unknown_length: int
    """Loops with collectives whose number of steps is not in the text: `sent` counts one step of each."""

    @property
    def total(self) -> float:
        return math.fsum(self.sent.values())


def collective_bytes(hlo_text: str, choice: Choice = max) -> CollectiveTraffic:
    """Bytes that one device sends in one run of a program, by kind of collective.

    Loops count as often as they run. The formulas are those of `SENT_SHARE`: the bytes of its own that a device must
    send under any algorithm. Bytes that it passes on for others in an all-to-all or a permutation are not counted, and
    neither is the padding of the layout.

    Args:
        hlo_text: `compiled.as_text()` of a program for CPUs, GPUs or TPUs.
        choice: `max` or `min`: which branch of a conditional with three or more branches counts, by its bytes. Of two
            branches, the more expensive one counts.

    Raises ValueError if the text is not a module, or a collective's groups are written in an unknown form.
    """
    return _Count(parse_module(hlo_text), choice).traffic()


class _Count:
    """A walk through the module that starts at its entry."""

    def __init__(self, module: Module, choice: Choice) -> None:
        self.module = module
        self.choice = choice
        self.unknown_loops: set[str] = set()
        self.counted: dict[str, Counter[str]] = {}

    def traffic(self) -> CollectiveTraffic:
        sent = self._computation(self.module.entry)
        return CollectiveTraffic({kind: sent[kind] for kind in SENT_SHARE if sent[kind]}, len(self.unknown_loops))

    def _computation(self, name: str) -> Counter[str]:
        if name not in self.counted:
            computation = self.module.computations[name]
            total: Counter[str] = Counter()
            for instruction in computation.values():
                total.update(self._instruction(instruction, computation))
            self.counted[name] = total
        return self.counted[name]

    def _instruction(self, instruction: Instruction, computation: Computation) -> Counter[str]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in SENT_SHARE:
            if kind == "all-reduce" and self._is_scattered(instruction, computation):
                kind = "reduce-scatter"
            operands = (computation[name].shape for name in instruction.operands)
            size = math.fsum(shape_bytes(shape) for shape in operands)
            return Counter({kind: size * SENT_SHARE[kind](self._group_size(instruction))})
        if instruction.opcode == "conditional":
            branches = instruction.computations("branch_computations", "true_computation", "false_computation")
            choice = self.choice if len(branches) > 2 else max
            return choice((self._computation(branch) for branch in branches), key=Counter.total)
        if instruction.opcode == "while":
            return self._loop(instruction, computation)
        total: Counter[str] = Counter()
        for callee in _runs(instruction):
            total.update(self._computation(callee))
        return total

    def _loop(self, loop: Instruction, computation: Computation) -> Counter[str]:
        body = self._computation(loop.attribute("body"))
        if not body.total():
            return body
        steps = loop_steps(loop, computation, self.module)
        if steps is None:
            self.unknown_loops.add(loop.name)
            steps = 1
        return Counter({kind: size * steps for kind, size in body.items()})

    def _is_scattered(self, reduction: Instruction, computation: Computation) -> bool:
        """Whether a fusion returns only this device's part of an all-reduce.

        The TPU compiler fuses the all-reduce with the slice that follows it, and then runs a reduce-scatter.
        """
        result = root(computation)
        is_slice = result.opcode == "dynamic-slice" and result.operands[0] == reduction.name
        return is_slice and computation is not self.module.computations[self.module.entry]

    def _group_size(self, collective: Instruction) -> int:
        """The number of devices that a collective connects; all devices if it names no groups.

        Groups are written in one of three forms: the members of each; the number and size of groups in the order of an
        iota; or axes of a mesh, which is the TPU compiler's form.
        """
        groups = collective.attributes.partition("replica_groups=")[2]
        if not groups or groups.startswith("{}"):
            return self.module.devices
        if explicit := re.match(r"\{\{([\d,]*)\}", groups):
            return len(explicit[1].split(","))
        if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
            return int(iota[1])
        if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", groups):
            sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1]))
            # A part of an axis is written `axis:(product of the sizes before it)its size`.
            axes = re.findall(r"'?([\w.]+)'?(?::\(\d+\)(\d+))?", mesh[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        raise ValueError(f"groups of {collective.name}: unknown form: {groups[:60]}")


def loop_steps(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """How often a `while` runs its body; None if that is not known.

    XLA records it on some platforms. On TPU it does not; there it follows from the form that `lax.scan` gives a loop: a
    counter with a constant start is compared with a constant end. The counter is assumed to grow by 1.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    condition = module.computations[loop.attribute("condition")]
    test = root(condition)
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    start, end = (_constant(condition[name], loop, computation) for name in test.operands)
    return None if start is None or end is None else max(end - start, 0)


def _constant(value: Instruction, loop: Instruction, computation: Computation) -> int | None:
    """A number in a loop's condition: a constant in it, or the initial value of an element of the carry."""
    carry = computation[loop.operands[0]]
    if value.opcode == "get-tuple-element" and carry.opcode == "tuple":
        value = computation[carry.operands[int(value.attribute("index"))]]
        while value.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
            value = computation[value.operands[0]]
    return int(value.arguments) if value.opcode == "constant" else None


def _runs(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs.

    The TPU compiler writes an all-gather that overlaps with computation several times: in a fusion that starts it, in
    fusions that advance it, and in one that ends it. Only the start is counted. Similarly, the later parts of an
    asynchronous call may name again what `async-start` has started.
    """
    if instruction.opcode in ("async-update", "async-done") or instruction.name.startswith("async-collective-done"):
        return []
    called = instruction.computations("calls", "to_apply", "called_computations")
    return [name for name in called if not name.startswith("async_collective_fusion")]
