"""The time, bubble and activations of a pipeline schedule, from the costs of its operations."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_jax.base.errors import require
from moe_jax.parallel.schedules.operations import Kind, Operation, PipelineSchedule, Place, Step
from moe_jax.parallel.schedules.timing import Span, Timeline, run_orders

Cost = float | Sequence[float]
"""The cost of a whole stage, or the costs of all pieces of the model in their order."""


@dataclass(frozen=True)
class Simulation:
    """Times in the unit of the costs, activations in stage-micro-batches."""

    timeline: Timeline
    """When each device does each of its steps."""
    makespan: float
    """From the start of the first step of all devices to the end of the last one."""
    busy: tuple[float, ...]
    """Each device's time in operations."""
    peak_activations: tuple[float, ...]
    """The most activations that each device holds. 1 is a stage's for one micro-batch."""

    @property
    def period(self) -> float:
        """The longest time of a device from its own first step to its own last one.

        Updates can follow each other this closely, if no device waits for the others between them.
        """
        return max(one[-1].end - one[0].start for one in self.timeline)

    @property
    def bubble(self) -> float:
        """Idle time of the worst device in a period, as the papers count it (docs/pipeline.md)."""
        # Sums of floats differ in their last digits, so a bubble of 0 could come out below it.
        return max(0.0, self.period - min(self.busy))

    @property
    def bubble_of_makespan(self) -> float:
        """Idle time of the worst device in the makespan: all devices wait at the update's end."""
        return self.makespan - min(self.busy)

    @property
    def efficiency(self) -> float:
        """The share of all devices' time in the makespan that is spent in operations."""
        return sum(self.busy) / (len(self.busy) * self.makespan)


def simulate(
    schedule: PipelineSchedule,
    forward: Cost = 1.0,
    backward_input: Cost = 1.0,
    backward_weight: Cost = 1.0,
    overlapped: float | None = None,
    communication: float = 0.0,
    *,
    lockstep: bool = False,
) -> Simulation:
    """Runs a schedule with given costs.

    forward, backward_input, backward_weight: F, Bi and W. One number is the cost of a stage, and a
        piece of half a stage costs half of it. A sequence has the cost of each piece of the model,
        in the model's order, so that stages may differ.
    overlapped: F&B, the cost of a forward and a whole backward at the same time. None: F + Bi + W,
        which is no gain. Pieces that cost more than the mean take more of it in proportion.
    communication: time from the end of an operation until its message can be used on another
        device. It keeps no device busy.
    lockstep: devices go from tick to tick together, as in one program over all devices. A tick
        takes as long as its slowest device, and `communication` once.

    UserError: costs that are negative, infinite or all 0, or a sequence of another length.
    """
    costs = _Costs(schedule, forward, backward_input, backward_weight, overlapped)
    _require_time("communication is", communication)
    if lockstep:
        timeline = _in_lockstep(schedule, costs, communication)
    else:
        timeline = run_orders(schedule, costs.of_step, communication)
    busy = tuple(sum(costs.of_step(d, span.step) for span in one) for d, one in enumerate(timeline))
    return Simulation(
        timeline=timeline,
        makespan=max(one[-1].end for one in timeline) - min(one[0].start for one in timeline),
        busy=busy,
        peak_activations=peak_activations(schedule),
    )


def peak_activations(schedule: PipelineSchedule) -> tuple[float, ...]:
    """The most activations each device holds, in stage-micro-batches.

    An operation's activations are there from the start of its forward to the end of its weights'
    gradient. Their number depends on the order alone, because a device does one step at a time.
    """
    return tuple(max(kept for kept, _ in one) for one in activations_of_steps(schedule))


def activations_of_steps(schedule: PipelineSchedule) -> tuple[tuple[tuple[float, float], ...], ...]:
    """What each device holds during each of its steps, in stage-micro-batches: (kept, pending).

    kept: activations, from the start of F to the end of W. pending: what Bi leaves for W, from the
    start of Bi to the end of W. A whole backward leaves nothing.
    """
    return tuple(tuple(_held(order, schedule.piece_size)) for order in schedule.orders)


def _held(order: Sequence[Step], size: float) -> Iterator[tuple[float, float]]:
    kept = 0
    pending = 0
    for step in order:
        kinds = [operation.kind for operation in step]
        kept += kinds.count(Kind.FORWARD)
        pending += kinds.count(Kind.BACKWARD_INPUT)
        yield kept * size, pending * size
        ended = kinds.count(Kind.BACKWARD_WEIGHT)
        kept -= ended + kinds.count(Kind.BACKWARD)
        pending -= ended


class _Costs:
    """The cost of each step."""

    def __init__(
        self,
        schedule: PipelineSchedule,
        forward: Cost,
        backward_input: Cost,
        backward_weight: Cost,
        overlapped: float | None,
    ) -> None:
        self.schedule = schedule
        self.forward = _of_pieces(schedule, "forward", forward)
        self.backward_input = _of_pieces(schedule, "backward_input", backward_input)
        self.backward_weight = _of_pieces(schedule, "backward_weight", backward_weight)
        self.gain = 1.0
        everything = sum(self.forward) + sum(self.backward_input) + sum(self.backward_weight)
        require(everything > 0, "all costs are 0: at least one must be positive")
        if overlapped is not None:
            _require_time("overlapped is", overlapped)
            self.gain = overlapped * schedule.stages / everything

    def of_step(self, device: int, step: Step) -> float:
        """The time that a device needs for a step."""
        total = sum(self._of_operation(device, operation) for operation in step)
        return total * self.gain if len(step) > 1 else total

    def _of_operation(self, device: int, operation: Operation) -> float:
        piece = self.schedule.positions[Place(device, operation.chunk)]
        if operation.kind == Kind.FORWARD:
            return self.forward[piece]
        if operation.kind == Kind.BACKWARD_INPUT:
            return self.backward_input[piece]
        if operation.kind == Kind.BACKWARD_WEIGHT:
            return self.backward_weight[piece]
        return self.backward_input[piece] + self.backward_weight[piece]


def _of_pieces(schedule: PipelineSchedule, name: str, cost: Cost) -> tuple[float, ...]:
    if isinstance(cost, Sequence):
        require(
            len(cost) == schedule.pieces,
            f"{name} has {len(cost)} costs: {schedule.name} has {schedule.pieces} pieces",
        )
        costs = tuple(cost)
    else:
        costs = (cost * schedule.piece_size,) * schedule.pieces
    for one in costs:
        _require_time(f"{name} has a cost of", one)
    return costs


def _require_time(words: str, value: float) -> None:
    require(0 <= value < math.inf, f"{words} {value}: it must be finite and not negative")


def _in_lockstep(schedule: PipelineSchedule, costs: _Costs, communication: float) -> Timeline:
    """Each tick begins when all devices have done the last one."""
    ticks = run_orders(schedule, lambda device, step: 1.0)
    lengths = [0.0] * int(max(one[-1].end for one in ticks))
    for device, one in enumerate(ticks):
        for span in one:
            tick = int(span.start)
            lengths[tick] = max(lengths[tick], costs.of_step(device, span.step))
    starts = [0.0]
    for length in lengths:
        starts.append(starts[-1] + length + communication)

    def moved(device: int, span: Span) -> Span:
        start = starts[int(span.start)]
        return Span(span.step, start, start + costs.of_step(device, span.step))

    return tuple(tuple(moved(d, span) for span in one) for d, one in enumerate(ticks))
