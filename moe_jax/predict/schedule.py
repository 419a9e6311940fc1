"""A compiled program as steps in scheduled order: compute, start a transfer, wait for it, loop.

A kernel of ours has its FLOPs and bytes as frontend attributes (moe_kernels.launch.Cost).
"""

import math
import re
from dataclasses import dataclass

from moe_jax.predict.hlo_text import Instruction, Program, parse
from moe_jax.predict.work import Work, work_of

COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "ragged-all-to-all",
)


@dataclass(frozen=True)
class Compute:
    """A kernel."""

    name: str
    work: Work


@dataclass(frozen=True)
class Start:
    """A transfer begins."""

    name: str
    kind: str
    """XLA's name of the collective."""
    size: int
    """Bytes of the operand on each device."""
    devices: tuple[int, ...]
    """The first of the groups that exchange, or all pairs of a permute one after the other."""
    waits: bool
    """Whether it also ends here."""


@dataclass(frozen=True)
class Wait:
    """The end of a transfer is waited for."""

    name: str
    """Of its start."""


@dataclass(frozen=True)
class Loop:
    """A part of the program that runs `turns` times. Of several parts one runs in each turn."""

    name: str
    turns: int
    bodies: tuple[str, ...]


Step = Compute | Start | Wait | Loop


@dataclass(frozen=True)
class Schedule:
    """The computations of a program that are scheduled."""

    steps: dict[str, list[Step]]
    entry: str


def read_schedule(text: str) -> Schedule:
    """The steps of `compiled.as_text()`."""
    program = parse(text)
    steps: dict[str, list[Step]] = {}
    missing = [program.entry]
    while missing:
        name = missing.pop()
        body = program.computations[name]
        by_name = {i.name: i for i in body}
        found = [step for i in body if (step := _step(program, i, by_name))]
        steps[name] = found
        inner = [body for step in found if isinstance(step, Loop) for body in step.bodies]
        missing += [body for body in inner if body not in steps]
    return Schedule(steps, program.entry)


def _step(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> Step | None:
    kind = _collective(program, i)
    if kind and i.opcode.endswith("-done"):
        return Wait(i.operands[0])
    if kind:
        size = sum(by_name[name].bytes for name in i.operands)
        devices = _pairs(i) if kind == "collective-permute" else replica_group(i.attributes)
        return Start(i.name, kind, size, tuple(devices), not i.opcode.endswith("-start"))
    if i.opcode == "conditional":
        return Loop(i.name, 1, tuple(_branches(i)))
    if i.opcode in ("while", "call") and i.called:
        return Loop(i.name, turns(i), (i.called,))
    work = work_of(program, i, by_name)
    return Compute(i.name, work) if work.flops or work.bytes else None


def turns(i: Instruction) -> int:
    """How often the body of a loop runs, 0 where that is decided at run time."""
    if i.opcode == "call":
        return 1
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', i.attributes)
    return int(known[1]) if known else 0


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.attributes)


def _collective(program: Program, i: Instruction) -> str | None:
    """The kind of transfer that an instruction starts, ends or does."""
    opcode = i.opcode.removesuffix("-start").removesuffix("-done")
    if opcode in COLLECTIVES:
        return opcode
    if opcode == "async" and i.called:
        inner = [j.opcode for j in program.computations[i.called] if j.opcode in COLLECTIVES]
        return inner[0] if inner else None
    return None


def _pairs(i: Instruction) -> list[int]:
    found = re.search(r"source_target_pairs=\{(\{.*?\})\}", i.attributes)
    return [int(device) for device in re.findall(r"\d+", found[1])] if found else []


def replica_group(attributes: str) -> list[int]:
    """The first group of devices of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return list(map(int, listed[1].split(",")))
    # [groups,size]<=[a,b]T(1,0): the numbers of all devices, reshaped, transposed, and cut.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes = list(map(int, iota[3].split(",")))
        order = list(map(int, iota[4].split(","))) if iota[4] else list(range(len(sizes)))
        strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
        return _numbers([(sizes[axis], strides[axis]) for axis in order], int(iota[2]))
    # mesh['a'=2,'b'=8] {'b':(2)4}: the axes of a mesh, or a part of one, by which a group goes.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if not mesh:
        raise ValueError(f"no replica groups in {attributes[:200]}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    parts = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2]):
        names = list(axes)
        inner = math.prod(axes[later] for later in names[names.index(name) + 1 :])
        own = int(size) if size else axes[name]
        parts.append((own, inner * axes[name] // (int(before or 1) * own)))
    return _numbers(parts, math.prod(size for size, _ in parts))


def _numbers(axes: list[tuple[int, int]], count: int) -> list[int]:
    """The first `count` devices along axes of (size, stride), the last axis fastest."""
    group = []
    for n in range(count):
        device = 0
        for size, stride in reversed(axes):
            n, index = divmod(n, size)
            device += index * stride
        group.append(device)
    return group
