"""How long a scheduled program takes, and how much of its transfers lies under products.

The model has two streams that work in order: one computes, one transfers. The start of a transfer
puts it into the second stream. Its end stalls the first stream until it is done.

    transfer     a latency and bytes on the wire / link (predict.collectives)
    product      max(FLOPs / rate, bytes / memory bandwidth)
    the rest     bytes / memory bandwidth, each number once

`Rates` has the plainest prices. Launches cost nothing there, and transfers take neither
multiprocessors nor memory bandwidth from products. predict.step_time has those of a card. A loop
whose number of turns is not known when it is compiled counts as none, so the rounds of a full
exchange buffer are not priced. Of the branches of a condition the longest one runs.

In a pipeline a tick takes as long as the longest step of any device in it.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from moe_jax.predict.collectives import Fabric, Group, collective_seconds
from moe_jax.predict.hardware import Link
from moe_jax.predict.schedule import (
    Compute,
    Loop,
    Schedule,
    Start,
    Step,
    Ticks,
    Wait,
    read_schedule,
)
from moe_jax.predict.work import Work

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
    slowed: float = 0.0
    """How much longer a kernel takes beside a transfer, relative to its time alone."""

    def seconds(self, work: Work) -> float:
        """Of a kernel alone."""
        return max(work.flops / self.flops, work.bytes / self.memory)

    def transfer_seconds(self, start: Start) -> float:
        """Of a transfer alone."""
        group = transfer_group(start, self.fabric.node)
        return collective_seconds(start.kind, start.size, group, self.fabric)


def transfer_group(start: Start, node: int) -> Group:
    """The devices of a transfer. Of a permute, a pair in two nodes if there is one."""
    if start.kind != "collective-permute":
        return Group.of(start.devices, node)
    pairs = zip(start.devices[::2], start.devices[1::2], strict=True)
    return Group(2, 1 if any(a // node != b // node for a, b in pairs) else 2)


class Event(NamedTuple):
    """A bar of the picture."""

    name: str
    kind: Literal[
        "product", "kernel", "attention", "attention gradient", "rest", "transfer", "loop"
    ]
    begin: float
    seconds: float


@dataclass
class Transfers:
    """Those of one kind: seconds, and how many of them the device waits."""

    seconds: float = 0.0
    stalled: float = 0.0

    @property
    def covered(self) -> float:
        """The share of the seconds during which the device computes."""
        # max: rounding may leave less than nothing.
        return max(0.0, 1 - self.stalled / self.seconds) if self.seconds else 1.0


@dataclass
class Timeline:
    """Predicted seconds of a program on one device."""

    total: float = 0.0
    products: float = 0.0
    rest: float = 0.0
    transfers: float = 0.0
    stalled: float = 0.0
    """Of `total`: waiting for a transfer."""
    idle: float = 0.0
    """Of `total`: waiting for the slowest device of a pipeline's ticks, the bubble included."""
    wire: float = 0.0
    """When the second stream is free."""
    waiting: dict[str, tuple[str, float]] = field(default_factory=dict)
    """(kind, end) of the transfers under way."""
    kinds: dict[str, Transfers] = field(default_factory=dict)
    """By XLA's name of the collective."""
    events: list[Event] = field(default_factory=list)
    loops: list[tuple[int, "Timeline"]] = field(default_factory=list)
    """(turns, one turn) of the loops in it."""

    @property
    def covered(self) -> float:
        """The share of the transfers' time during which the device computes."""
        return Transfers(self.transfers, self.stalled).covered

    def of(self, kind: str) -> Transfers:
        """The transfers of one kind, none of them if there are none."""
        return self.kinds.setdefault(kind, Transfers())

    def add(self, other: "Timeline", turns: int) -> None:
        """`turns` runs of a loop's body, one after the other."""
        self.events.append(Event("loop", "loop", self.total, turns * other.total))
        self.loops.append((turns, other))
        for name in ("total", "products", "rest", "transfers", "stalled", "idle"):
            setattr(self, name, getattr(self, name) + turns * getattr(other, name))
        for kind, transfers in other.kinds.items():
            self.of(kind).seconds += turns * transfers.seconds
            self.of(kind).stalled += turns * transfers.stalled

    def compute(self, step: Compute, seconds: float, slowed: float) -> None:
        """A kernel runs in the first stream, slower while the second one is busy."""
        beside = min(seconds, max(0.0, self.wire - self.total))
        seconds += slowed * beside
        self.events.append(Event(step.name, step.work.kind, self.total, seconds))
        if step.work.flops:
            self.products += seconds
        else:
            self.rest += seconds
        self.total += seconds

    def start(self, name: str, kind: str, seconds: float) -> None:
        """A transfer enters the second stream."""
        begin = max(self.wire, self.total)
        self.events.append(Event(name, "transfer", begin, seconds))
        self.wire = begin + seconds
        self.waiting[name] = (kind, self.wire)
        self.transfers += seconds
        self.of(kind).seconds += seconds

    def wait(self, name: str) -> None:
        """The first stream waits until the transfer has ended."""
        kind, end = self.waiting.pop(name)
        stall = max(0.0, end - self.total)
        self.of(kind).stalled += stall
        self.stalled += stall
        self.total += stall


def timeline(text: str, rates: Rates, *, products_alone: bool = False, loop: str = "") -> Timeline:
    """The prediction for a compiled program, `compiled.as_text()`.

    With `products_alone` everything but products and transfers takes no time. The covered share is
    then that which lies under products, and copies cannot hide a transfer. With `loop` it is one
    turn of the loop in the jax.named_scope of this name.
    """
    return run(read_schedule(text, loop), rates, products_alone=products_alone)


def covered_by_products(text: str, rates: Rates) -> float:
    """The share of the transfers' time that lies under products."""
    return timeline(text, rates, products_alone=True).covered


def run(schedule: Schedule, rates: Rates, *, products_alone: bool = False) -> Timeline:
    """timeline of a program that was read."""
    return _run(schedule, schedule.entry, rates, products_alone)


def _run(schedule: Schedule, name: str, rates: Rates, alone: bool) -> Timeline:
    line = Timeline()
    for step in schedule.steps[name]:
        _advance(line, schedule, step, rates, alone)
    return line


def _advance(line: Timeline, schedule: Schedule, step: Step, rates: Rates, alone: bool) -> None:
    match step:
        case Compute(_, work):
            counted = work.flops > 0 or not alone
            line.compute(step, rates.seconds(work) if counted else 0.0, rates.slowed)
        case Start(name, waits=waits):
            line.start(name, step.kind, rates.transfer_seconds(step))
            if waits:
                line.wait(name)
        case Wait(name):
            line.wait(name)
        case Loop(_, turns, bodies):
            runs = [_run(schedule, body, rates, alone) for body in bodies]
            line.add(max(runs, key=lambda run: run.total), turns)
        case Ticks():
            _add_ticks(line, step, {b: _run(schedule, b, rates, alone) for b in step.bodies})


def _add_ticks(line: Timeline, ticks: Ticks, runs: dict[str, Timeline]) -> None:
    before = line.total
    for body, turns in ticks.own:
        line.add(runs[body], turns)
    together = sum(
        count * max(runs[body].total for body in bodies) for bodies, count in ticks.meetings
    )
    idle = max(0.0, together - (line.total - before))
    line.idle += idle
    line.total += idle
