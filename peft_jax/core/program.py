"""What a compiled program does, read from its text (`compiled.as_text()`): products, kernels and
what moves between devices, each as often as it runs.

`cost_analysis` counts the body of a loop once and a kernel as nothing. Here a loop's body counts
as often as the loop turns, and an asynchronous collective as often as it is started: the steps of
other work that it overlaps repeat its instruction, with its channel, also in loops inside.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[fsu]\d+)(?:e\dm\d\w*)?\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(rf"^(?:ragged-)?({'|'.join(KINDS)})(?:-start)?$")
_CALLED = re.compile(r"(?:calls|to_apply|async_computation|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KERNELS = ("tpu_custom_call", "__cudnn", "triton")


class Instruction(NamedTuple):
    """One line of a computation: its name, what it yields, its operation, and the rest."""

    name: str
    type: str
    operation: str
    rest: str


class Collective(NamedTuple):
    """A collective: its kind, the type of its result on one device (of a reduce-scatter its
    operand's) and the bytes of that, how often it runs, and the operation of the model that it is
    for.
    """

    kind: str
    type: str
    size: int
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of all its runs on one device."""
        return self.size * self.times


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does in one run: floating-point operations of its products (kernels left
    out), kernels by name with how often they run, and collectives.
    """

    flops: float
    kernels: dict[str, int]
    collectives: tuple[Collective, ...]

    @property
    def moved(self) -> int:
        """Bytes of all collectives on one device."""
        return sum(c.bytes for c in self.collectives)


def read_program(text: str) -> Program:
    """The program of `compiled.as_text()`.

    A loop turns as often as the compiler says, or as the largest constant in its condition.
    """
    module = _Module(text)
    flops, kernels = 0.0, collections.Counter[str]()
    found: dict[str, Collective] = {}
    for computation, instruction, times in module.runs():
        flops += times * module.flops(computation, instruction)
        if name := _kernel(instruction):
            kernels[name] += times
        if (match := _COLLECTIVE.match(instruction.operation)) and module.moves(instruction):
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = channel.group(1) if channel else f"{computation}/{instruction.name}"
            other = found.get(key)
            if other is None or times < other.times:
                moved = module.moved_by(computation, instruction)
                found[key] = _collective(match.group(1), instruction, moved, times)
    return Program(flops, dict(kernels), tuple(found.values()))


class _Module:
    """The computations of a program's text."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        name = self.entry = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header.group(2)
                self.computations[name] = []
                self.entry = name if header.group(1) else self.entry
            elif name and (match := _INSTRUCTION.match(line)):
                self.computations[name].append(Instruction(*match.groups()))

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that the entry reaches."""
        waiting = [(self.entry, 1)]
        while waiting:
            computation, times = waiting.pop()
            for instruction in self.computations.get(computation, ()):
                yield computation, instruction, times
                turns = self._turns(instruction) if instruction.operation == "while" else 1
                waiting += [(called, times * turns) for called in _called(instruction)]

    def _turns(self, loop: Instruction) -> int:
        """How often a loop turns: what the compiler says, or how many steps of its counter, from 0
        on, reach the largest constant in its condition.
        """
        if known := re.search(r"known_trip_count\D*(\d+)", loop.rest):
            return int(known.group(1))
        condition, body = (_named(loop, key) for key in ("condition", "body"))
        lines = self.computations.get(condition, ())
        bound = max([_constant(i) or 1 for i in lines] or [1])
        counters = [re.search(r"index=(\d+)", i.rest) for i in lines]
        steps = [self._step(body, int(c.group(1))) for c in counters if c]
        return -(-bound // max([s for s in steps if s] or [1]))

    def _step(self, body: str, index: int) -> int:
        """By how much a turn moves the counter that is number `index` of what the loop carries."""
        own = {i.name: i for i in self.computations.get(body, ())}
        root = self.computations[body][-1] if own else None
        name = None if root is None else _operands(root)[index]
        total = 0
        while name in own and own[name].operation in ("add", "copy", "bitcast"):
            operands = _operands(own[name])
            total += sum(_constant(own[n]) or 0 for n in operands if n in own)
            name = operands[0]
        return total

    @functools.cached_property
    def types(self) -> dict[tuple[str, str], str]:
        """(computation, instruction) -> the type of what it yields."""
        return {(c, i.name): i.type for c, own in self.computations.items() for i in own}

    def moved_by(self, computation: str, instruction: Instruction) -> str:
        """The type of what a collective moves: its result, of a reduction that scatters its
        operands.
        """
        if "reduce-scatter" not in instruction.operation:
            return instruction.type
        names = _operands(instruction)
        return " ".join(self.types.get((computation, n), "") for n in names)

    def moves(self, instruction: Instruction) -> bool:
        """Whether a collective has more than one device in a group."""
        return not re.search(r"replica_groups=\{(\{\d+\},?)+\}", instruction.rest)

    def flops(self, computation: str, instruction: Instruction) -> float:
        """Two for each multiplication of a product."""
        if instruction.operation not in ("dot", "convolution"):
            return 0.0
        names = _operands(instruction)[:2]
        left, right = (_sizes(self.types.get((computation, n), "f32[]")) for n in names)
        out = math.prod(_sizes(instruction.type))
        if instruction.operation == "dot":
            summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
            axes = [int(n) for n in summed.group(1).split(",") if n] if summed else []
            return 2.0 * out * math.prod(left[a] for a in axes)
        return _convolution_flops(instruction, left, right)


def _convolution_flops(instruction: Instruction, left: list[int], right: list[int]) -> float:
    """Of a convolution, as TPUs have products: what meets padding is not counted."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0.0
    inputs, kernel, result = labels.groups()
    sizes = dict(zip(result, _sizes(instruction.type), strict=False))
    wide = dict(zip(inputs, left, strict=False))
    taps = dict(zip(kernel, right, strict=False))
    pads = re.search(r"pad=(\S+?)[ }]", instruction.rest)
    before = [int(p.split("_")[0]) for p in pads.group(1).split("x")] if pads else []
    strides = re.search(r"stride=([\dx]+)", instruction.rest)
    apart = [int(n) for n in strides.group(1).split("x")] if strides else []
    pairs = 1
    for axis in filter(str.isdigit, result):
        lo, by = (x[int(axis)] if x else y for x, y in ((before, 0), (apart, 1)))
        at = [o * by + t - lo for o in range(sizes[axis]) for t in range(taps[axis])]
        pairs *= sum(0 <= place < wide[axis] for place in at)
    return 2.0 * sizes["b"] * sizes["f"] * taps["i"] * pairs


def _named(instruction: Instruction, key: str) -> str:
    found = re.search(rf"{key}=%?([\w.\-]+)", instruction.rest)
    return found.group(1) if found else ""


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"(\d+)\)", instruction.rest)
    return int(value.group(1)) if value and instruction.operation == "constant" else None


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.rest)
    several = re.findall(r"%?([\w.\-]+)", branches.group(1)) if branches else []
    return [*_CALLED.findall(instruction.rest), *several]


def _collective(kind: str, instruction: Instruction, moved: str, times: int) -> Collective:
    shapes = [m.group() for m in _SHAPE.finditer(moved)]
    if (
        instruction.operation.endswith("-start") and kind != "reduce-scatter"
    ):  # (operands, results, ...)
        shapes = [s for s in shapes if s not in ("u32[]", "s32[]")]
        shapes = shapes[len(shapes) // 2 :] if kind != "all-reduce" else shapes
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    where = source.group(1) if source else ""
    return Collective(kind, " ".join(shapes), sum(map(_bytes, shapes)), times, where)


def _kernel(instruction: Instruction) -> str | None:
    """The name of the kernel that an instruction calls."""
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    if instruction.operation != "custom-call" or target is None:
        return None
    if not target.group(1).startswith(_KERNELS):
        return None
    named = re.search(r'op_name="[^"]*?([\w.\-]+)/pallas_call', instruction.rest)
    return named.group(1) if named else target.group(1)


def _sizes(type: str) -> list[int]:
    match = _SHAPE.search(type)
    return [int(n) for n in match.group(2).split(",") if n] if match else []


def _bytes(shape: str) -> int:
    match = _SHAPE.match(shape)
    assert match is not None
    bits = _BITS.get(match.group(1)) or int(match.group(1)[1:])
    return bits * math.prod(int(n) for n in match.group(2).split(",") if n) // 8
