"""How long a scheduled program takes, and how much of its transfers lies under products.

The model has two streams that work in order: one computes, one transfers. The start of a transfer
puts it into the second stream. Its end stalls the first stream until it is done.

    transfer     a latency and bytes on the wire / link (predict.collectives)
    product      max(FLOPs / rate, bytes / memory bandwidth)
    the rest     bytes / memory bandwidth, each number once

Launches cost nothing. Transfers take neither multiprocessors nor memory bandwidth from products.
A kernel of ours has its FLOPs and bytes as frontend attributes (moe_kernels.launch.Cost). A loop
whose number of turns is not known when it is compiled counts as none. So the rounds of a full
exchange buffer are not priced.
"""

import math
import re
from dataclasses import dataclass, field

from moe_jax.predict.collectives import Fabric, Group, collective_seconds
from moe_jax.predict.hardware import Link
from moe_jax.predict.hlo_text import Instruction, Program, dimensions, parse, shape_bytes

COLLECTIVES = (
    "all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "ragged-all-to-all",
)
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "iota", "broadcast"),
}
"""They move no bytes, or were made a part of what uses them."""
SLICES = ("slice", "dynamic-slice", "gather")
PASSING = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Inside a fusion: one number in, one number out."""


ASSUMED = Fabric(
    node=8,
    inside=Link("450 GB/s", peak=450e9, rate=450e9, hop=1.6e-6, tree_hop=1.6e-6),
    outside=Link("50 GB/s", peak=50e9, rate=50e9, hop=1.6e-6, tree_hop=1.6e-6),
)
"""Links at their full speed. A transfer of no bytes takes 10 microseconds."""


@dataclass(frozen=True)
class Rates:
    """What a device is assumed to do. The numbers are an H100's, as good programs reach them."""

    flops: float = 600e12
    """Of bfloat16 products."""
    memory: float = 3.35e12
    """Bytes a second."""
    fabric: Fabric = ASSUMED


@dataclass
class Timeline:
    """Predicted seconds of a program on one device."""

    total: float = 0.0
    products: float = 0.0
    rest: float = 0.0
    transfers: float = 0.0
    stalled: float = 0.0
    """Of `total`: waiting for a transfer."""
    wire: float = 0.0
    """When the second stream is free."""
    waiting: dict[str, float] = field(default_factory=dict)

    @property
    def covered(self) -> float:
        """The share of the transfers' time during which the device computes."""
        # max: rounding may leave less than nothing.
        return max(0.0, 1 - self.stalled / self.transfers) if self.transfers else 1.0

    def add(self, other: "Timeline", turns: int) -> None:
        """`turns` runs of a loop's body, one after the other."""
        for name in ("total", "products", "rest", "transfers", "stalled"):
            setattr(self, name, getattr(self, name) + turns * getattr(other, name))

    def start(self, name: str, seconds: float) -> None:
        """A transfer enters the second stream."""
        self.wire = max(self.wire, self.total) + seconds
        self.waiting[name] = self.wire
        self.transfers += seconds

    def wait(self, name: str) -> None:
        """The first stream waits until the transfer has ended."""
        stall = max(0.0, self.waiting.pop(name) - self.total)
        self.stalled += stall
        self.total += stall


def timeline(text: str, rates: Rates, *, products_alone: bool = False) -> Timeline:
    """The prediction for a compiled program, `compiled.as_text()`.

    With `products_alone` everything but products and transfers takes no time. The covered share is
    then that which lies under products, and copies cannot hide a transfer.
    """
    program = parse(text)
    return _run(program, program.entry, rates, products_alone)


def covered_by_products(text: str, rates: Rates) -> float:
    """The share of the transfers' time that lies under products."""
    return timeline(text, rates, products_alone=True).covered


def _run(program: Program, name: str, rates: Rates, alone: bool) -> Timeline:
    line = Timeline()
    body = program.computations[name]
    by_name = {i.name: i for i in body}
    for i in body:
        kind = _collective(program, i)
        if kind and i.opcode.endswith("-done"):
            line.wait(i.operands[0])
        elif kind:
            line.start(i.name, transfer_seconds(kind, i, by_name, rates))
            if not i.opcode.endswith("-start"):
                line.wait(i.name)
        elif i.opcode in ("while", "call") and i.called:
            line.add(_run(program, i.called, rates, alone), turns(i))
        else:
            _compute(line, program, i, by_name, (rates, alone))
    return line


def _compute(
    line: Timeline,
    program: Program,
    i: Instruction,
    by_name: dict[str, Instruction],
    how: tuple[Rates, bool],
) -> None:
    rates, alone = how
    flops = product_flops(program, i, by_name)
    moved = traffic(program, i, by_name)
    if flops:
        seconds = max(flops / rates.flops, moved / rates.memory)
        line.products += seconds
    else:
        seconds = 0.0 if alone else moved / rates.memory
        line.rest += seconds
    line.total += seconds


def turns(i: Instruction) -> int:
    """How often the body of a loop runs, 0 where that is decided at run time."""
    if i.opcode == "call":
        return 1
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', i.attributes)
    return int(known[1]) if known else 0


def _collective(program: Program, i: Instruction) -> str | None:
    """The kind of transfer that an instruction starts, ends or does."""
    opcode = i.opcode.removesuffix("-start").removesuffix("-done")
    if opcode in COLLECTIVES:
        return opcode
    if opcode == "async" and i.called:
        inner = [j.opcode for j in program.computations[i.called] if j.opcode in COLLECTIVES]
        return inner[0] if inner else None
    return None


def transfer_seconds(
    kind: str, i: Instruction, by_name: dict[str, Instruction], rates: Rates
) -> float:
    """Of the first of the groups that exchange."""
    size = sum(by_name[name].bytes for name in i.operands)
    return collective_seconds(kind, size, transfer_group(kind, i, rates.fabric.node), rates.fabric)


def transfer_group(kind: str, i: Instruction, node: int) -> Group:
    """The devices of a transfer. Of a permute, a pair in two nodes if there is one."""
    if kind != "collective-permute":
        return Group.of(replica_group(i.attributes), node)
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", i.attributes)
    moves = [
        tuple(map(int, pair.split(",")))
        for pair in re.findall(r"\{([\d,]+)\}", pairs[0] if pairs else "")
    ]
    crosses = any(a // node != b // node for a, b in moves)
    return Group(2, 1 if crosses else 2)


def replica_group(attributes: str) -> list[int]:
    """The first group of devices of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return list(map(int, listed[1].split(",")))
    # [groups,size]<=[a,b]T(1,0): the numbers of all devices, reshaped, transposed, and cut.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if not iota:
        raise ValueError(f"no replica groups in {attributes[:200]}")
    sizes = list(map(int, iota[3].split(",")))
    order = list(map(int, iota[4].split(","))) if iota[4] else list(range(len(sizes)))
    strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    group = []
    for n in range(int(iota[2])):
        device = 0
        for axis in reversed(order):
            n, index = divmod(n, sizes[axis])
            device += index * strides[axis]
        group.append(device)
    return group


def product_flops(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> int:
    """FLOPs of the matrix products in an instruction, 0 if there are none."""
    if i.opcode in FREE:
        return 0
    if stated := i.frontend("flops"):
        return int(stated)
    if i.opcode == "dot":
        return _dot_flops(i, by_name)
    if i.opcode == "custom-call" and "__cublas" in i.attributes:
        left, right = (dimensions(by_name[name].shape)[0][1] for name in i.operands[:2])
        out = dimensions(i.shape)[0][1]
        # Whatever is transposed: |left| |right| / |out| is the square of the contraction.
        return 2 * round(math.sqrt(math.prod(left) * math.prod(right) * math.prod(out)))
    if i.opcode in ("fusion", "call") and i.called:
        inner = program.computations[i.called]
        names = {j.name: j for j in inner}
        return sum(product_flops(program, j, names) for j in inner)
    return 0


def _dot_flops(i: Instruction, by_name: dict[str, Instruction]) -> int:
    left = dimensions(by_name[i.operands[0]].shape)[0][1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    axes = [int(a) for a in contracted[1].split(",") if a] if contracted else []
    return 2 * math.prod(dimensions(i.shape)[0][1]) * math.prod(left[a] for a in axes)


def traffic(program: Program, i: Instruction, by_name: dict[str, Instruction]) -> int:
    """Bytes read and written. Of a sliced or gathered operand, only what is taken of it."""
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    if stated := i.frontend("bytes"):
        return int(stated)
    if i.opcode in SLICES:
        return 2 * i.bytes
    if i.opcode == "dynamic-update-slice":
        return 2 * by_name[i.operands[1]].bytes
    if i.opcode == "fusion" and i.called:
        return _fusion_traffic(program.computations[i.called])
    return i.bytes + sum(by_name[name].bytes for name in i.operands)


def _fusion_traffic(inner: list[Instruction]) -> int:
    by_name = {j.name: j for j in inner}
    users: dict[str, list[Instruction]] = {}
    for j in inner:
        for operand in j.operands:
            users.setdefault(operand, []).append(j)
    read = sum(_read(j, users, by_name) for j in inner if j.opcode == "parameter")
    root = next(j for j in inner if j.root)
    outputs = [by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    return read + sum(_written(j, by_name) for j in outputs)


def _read(
    i: Instruction, users: dict[str, list[Instruction]], by_name: dict[str, Instruction]
) -> int:
    """Bytes that a fusion reads of a parameter, or of a value that is the same numbers."""
    total = 0
    for user in users.get(i.name, []):
        if user.opcode in SLICES and user.operands[0] == i.name:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == i.name:
            continue  # updated in place
        elif user.opcode in PASSING and not user.root:
            total += _read(user, users, by_name)
        else:
            return i.bytes
    return min(total, i.bytes)


def _written(i: Instruction, by_name: dict[str, Instruction]) -> int:
    while i.opcode in PASSING and i.operands[0] in by_name:
        before = by_name[i.operands[0]]
        if before.opcode != "dynamic-update-slice" and before.opcode not in PASSING:
            break
        i = before
    if i.opcode == "dynamic-update-slice":
        return by_name[i.operands[1]].bytes
    return shape_bytes(i.shape)
