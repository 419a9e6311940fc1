"""The table of a pipeline schedule: what every device does, receives and stores at each tick.

An executor in one program goes through the rows of this table. In a tick each device takes its
inputs from its slots, does one step, and sends the outputs. Messages are there at the end of the
tick, and the receiver then stores them in the slots that the table names. No JAX here.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from moe_jax.parallel.schedules.operations import (
    Kind,
    Operation,
    PipelineSchedule,
    Place,
    Step,
)
from moe_jax.parallel.schedules.timing import TO_INPUT, run_orders

IDLE = 0
OVERLAPPED = max(Kind) + 1
"""A forward and a whole backward at the same time."""
NONE = -1
"""In place of a micro-batch, a chunk or a slot where there is none."""

Payload = Literal["activation", "gradient"]


@dataclass(frozen=True)
class Part:
    """The forward, or the backward, that each device does at each tick. NONE where it does none."""

    microbatch: Int[np.ndarray, "ticks G"]
    chunk: Int[np.ndarray, "ticks G"]
    inbox: Int[np.ndarray, "ticks G"]
    """Slot of the message that it takes. NONE: the first piece's forward has the tokens instead,
    the last piece's backward has the loss, and the weights' gradient takes no message."""
    saved: Int[np.ndarray, "ticks G"]
    """Slot of the activations. The forward writes it, every backward reads it."""
    pending: Int[np.ndarray, "ticks G"]
    """Slot of what a backward to the input leaves for the weights' gradient. Both have it."""


@dataclass(frozen=True)
class Channel:
    """All messages of one payload that go equally far."""

    payload: Payload
    hop: int
    """The receiver is device (sender + hop) modulo the devices. 1 is the next device, `devices - 1`
    the one before. 0: the device keeps the message itself, at the fold of a path like a V."""
    sends: Bool[np.ndarray, "ticks G"]
    """Whether a device sends at the end of a tick."""
    slots: Int[np.ndarray, "ticks G"]
    """The inbox slot in which a device stores what comes in at the end of a tick, or NONE."""


@dataclass(frozen=True)
class Slots:
    """How many slots a device needs of each kind, the largest number of all devices."""

    activation: int
    """Messages with a piece's input that wait for their forward."""
    gradient: int
    """Messages with the gradient of a piece's output that wait for their backward."""
    saved: int
    """Activations of a piece and a micro-batch, between its forward and its last backward."""
    pending: int
    """What lies between a backward to the input and the weights' gradient."""


@dataclass(frozen=True)
class TickTable:
    """A schedule as arrays over ticks and devices."""

    kinds: Int[np.ndarray, "ticks G"]
    """IDLE, a Kind, or OVERLAPPED."""
    forward: Part
    backward: Part
    """Whole backwards, and their parts."""
    channels: tuple[Channel, ...]
    slots: Slots


Key = tuple[int, Place]
"""A micro-batch at a place."""
Intervals = dict[Key, tuple[int, int]]
"""First and last tick in which something must be kept."""


class _Times(NamedTuple):
    """Ticks of the operations of every micro-batch at every place."""

    forward: dict[Key, int]
    to_input: dict[Key, int]
    """The whole backward, or the one to the input."""
    last: dict[Key, int]
    """The whole backward, or the one to the weights."""


def tick_table(schedule: PipelineSchedule) -> TickTable:
    """Every step takes one tick and begins as early as its order and its messages allow."""
    timeline = run_orders(schedule, lambda device, step: 1.0)
    rows = [
        (int(span.start), device, span.step)
        for device, spans in enumerate(timeline)
        for span in spans
    ]
    shape = (1 + max(tick for tick, _, _ in rows), schedule.devices)
    times = _times(rows)
    activation = _messages(schedule, times.forward, -1)
    gradient = _messages(schedule, times.to_input, 1)
    pending = {k: (t, times.last[k]) for k, t in times.to_input.items() if t < times.last[k]}
    places = {
        "activation": _assign({k: (sent + 1, taken) for k, (sent, taken) in activation.items()}),
        "gradient": _assign({k: (sent + 1, taken) for k, (sent, taken) in gradient.items()}),
        "saved": _assign({k: (t, times.last[k]) for k, t in times.forward.items()}),
        "pending": _assign(pending),
    }
    kinds = np.full(shape, IDLE, np.int32)
    forward = _empty_part(shape)
    backward = _empty_part(shape)
    for tick, device, step in rows:
        kinds[tick, device] = step[0].kind if len(step) == 1 else OVERLAPPED
        for operation in step:
            if operation.kind == Kind.FORWARD:
                _fill(forward, (tick, device), operation, places, "activation")
            else:
                _fill(backward, (tick, device), operation, places, "gradient")
    return TickTable(
        kinds=kinds,
        forward=forward,
        backward=backward,
        channels=(
            *_channels(schedule, "activation", activation, places["activation"], shape),
            *_channels(schedule, "gradient", gradient, places["gradient"], shape),
        ),
        slots=Slots(
            **{name: 1 + max(slots.values(), default=-1) for name, slots in places.items()}
        ),
    )


def _times(rows: Iterable[tuple[int, int, Step]]) -> _Times:
    times = _Times({}, {}, {})
    for tick, device, step in rows:
        for kind, microbatch, chunk in step:
            key = (microbatch, Place(device, chunk))
            if kind == Kind.FORWARD:
                times.forward[key] = tick
            if kind in TO_INPUT:
                times.to_input[key] = tick
            if kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT):
                times.last[key] = tick
    return times


def _messages(schedule: PipelineSchedule, ticks: dict[Key, int], towards: int) -> Intervals:
    """(tick of sending, tick of use) of what each micro-batch gets at each place.

    `towards` is -1 if it comes from the piece before, and 1 if it comes from the piece after.
    """
    found = {}
    for (microbatch, place), used in ticks.items():
        sender = _neighbour(schedule, (microbatch, place), towards)
        if sender is not None:
            found[microbatch, place] = (ticks[microbatch, sender], used)
    return found


def _neighbour(schedule: PipelineSchedule, key: Key, towards: int) -> Place | None:
    """The place of the piece before or after, or None at the end of the path."""
    path = schedule.path_of(key[0])
    piece = schedule.positions[key[1]] + towards
    return path[piece] if 0 <= piece < len(path) else None


def _assign(intervals: Intervals) -> dict[Key, int]:
    """A slot of its device for each interval. Intervals of one slot have no tick in common.

    The lowest free slot in the order of the first ticks needs no more slots than the largest
    number of intervals that have a tick in common.
    """
    free_from: dict[int, list[int]] = defaultdict(list)
    slots = {}
    for key, (first, last) in sorted(intervals.items(), key=lambda item: item[1]):
        ends = free_from[key[1].device]
        slot = next((s for s, end in enumerate(ends) if end < first), len(ends))
        ends[slot : slot + 1] = [last]
        slots[key] = slot
    return slots


def _empty_part(shape: tuple[int, int]) -> Part:
    return Part(*(np.full(shape, NONE, np.int32) for _ in range(5)))


def _fill(
    part: Part,
    cell: tuple[int, int],
    operation: Operation,
    places: dict[str, dict[Key, int]],
    inbox: Payload,
) -> None:
    key = (operation.microbatch, Place(cell[1], operation.chunk))
    part.microbatch[cell] = operation.microbatch
    part.chunk[cell] = operation.chunk
    part.saved[cell] = places["saved"][key]
    if operation.kind != Kind.BACKWARD_WEIGHT:
        part.inbox[cell] = places[inbox].get(key, NONE)
    if operation.kind != Kind.FORWARD:
        part.pending[cell] = places["pending"].get(key, NONE)


def _channels(
    schedule: PipelineSchedule,
    payload: Payload,
    messages: Intervals,
    slots: dict[Key, int],
    shape: tuple[int, int],
) -> list[Channel]:
    """One channel for each distance that occurs."""
    channels: dict[int, Channel] = {}
    for key, (sent, _) in messages.items():
        sender = _neighbour(schedule, key, -1 if payload == "activation" else 1)
        assert sender is not None, f"{key} gets a message from nowhere"
        receiver = key[1].device
        hop = (receiver - sender.device) % schedule.devices
        empty = (np.zeros(shape, bool), np.full(shape, NONE, np.int32))
        channel = channels.setdefault(hop, Channel(payload, hop, *empty))
        channel.sends[sent, sender.device] = True
        channel.slots[sent, receiver] = slots[key]
    return [channels[hop] for hop in sorted(channels)]
