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
    """0: it is decided at run time."""
    bodies: tuple[str, ...]
    scope: str = ""
    """The innermost jax.named_scope around it."""


@dataclass(frozen=True)
class Ticks:
    """The steps of a device of a pipeline. All devices go from tick to tick together."""

    name: str
    own: tuple[tuple[str, int], ...]
    """(part of the program, how often the device runs it)"""
    meetings: tuple[tuple[frozenset[str], int], ...]
    """(parts that the devices run in a tick, number of such ticks)"""

    @property
    def bodies(self) -> tuple[str, ...]:
        """All parts."""
        met = {body for bodies, _ in self.meetings for body in bodies}
        return tuple(sorted(met | {body for body, _ in self.own}))


Step = Compute | Start | Wait | Loop | Ticks


@dataclass(frozen=True)
class Schedule:
    """The computations of a program that are scheduled."""

    steps: dict[str, list[Step]]
    entry: str


def read_schedule(text: str, loop: str = "") -> Schedule:
    """The steps of `compiled.as_text()`, or of a turn of the loop in jax.named_scope(loop)."""
    program = parse(text)
    entry = program.loop_body(loop) if loop else program.entry
    steps: dict[str, list[Step]] = {}
    missing = [entry]
    while missing:
        name = missing.pop()
        body = program.computations[name]
        by_name = {i.name: i for i in body}
        found = [step for i in body if (step := _step(program, i, by_name))]
        steps[name] = found
        inner = [body for step in found if isinstance(step, Loop) for body in step.bodies]
        missing += [body for body in inner if body not in steps]
    return Schedule(steps, entry)


def _step(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> Step | None:
    kind = _collective(program, i)
    if kind and i.opcode.endswith("-done"):
        return Wait(i.operands[0])
    if kind:
        size = sum(by_name[name].bytes for name in i.operands)
        devices = _pairs(i) if kind == "collective-permute" else replica_group(i.attributes)
        return Start(i.name, kind, size, tuple(devices), not i.opcode.endswith("-start"))
    if i.opcode == "conditional":
        return Loop(i.name, 1, tuple(_branches(i)), _innermost(i))
    if i.opcode in ("while", "call") and i.called:
        return Loop(i.name, turns(i), (i.called,), _innermost(i))
    work = work_of(program, i, by_name)
    return Compute(i.name, work) if work.flops or work.bytes else None


def turns(i: Instruction) -> int:
    """How often the body of a loop runs, 0 where that is decided at run time."""
    if i.opcode == "call":
        return 1
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', i.attributes)
    return int(known[1]) if known else 0


def _innermost(i: Instruction) -> str:
    """`last` of `jit(step)/while/body/last/while`."""
    names = i.scope.split("/")
    return names[-2] if len(names) > 1 else ""


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
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={TRANSPOSED}", attributes)
    if iota:
        return _transposed(iota[3], iota[4], int(iota[2]))
    # mesh['a'=2,'b'=8] {'b':(2)4}: the axes of a mesh, or a part of one, by which a group goes.
    devices = rf"(?:, device_ids=\({TRANSPOSED}\))?"
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\]{devices} \{{([^}}]*)\}}", attributes)
    if not mesh:
        raise ValueError(f"no replica groups in {attributes[:200]}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    places = _mesh_places(axes, mesh[4])
    if not mesh[2]:
        return places
    numbers = _transposed(mesh[2], mesh[3], math.prod(axes.values()))
    return [numbers[place] for place in places]


TRANSPOSED = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""How XLA writes the numbers from 0, reshaped and transposed."""


def _transposed(sizes: str, order: str | None, count: int) -> list[int]:
    dimensions = list(map(int, sizes.split(",")))
    axes = list(map(int, order.split(","))) if order else list(range(len(dimensions)))
    strides = [math.prod(dimensions[k + 1 :]) for k in range(len(dimensions))]
    return _numbers([(dimensions[axis], strides[axis]) for axis in axes], count)


def _mesh_places(axes: dict[str, int], named: str) -> list[int]:
    """The places in a mesh of the first group along the axes, or parts of axes, that are named."""
    parts = []
    names = list(axes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named):
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
