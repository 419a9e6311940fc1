"""When each step runs, if every device does its own order as early as it can.

This is the one place that knows what an operation waits for. The checks, the table of ticks and the
simulator are made from it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules.operations import Kind, Operation, PipelineSchedule, Place, Step

Duration = Callable[[int, Step], float]
"""(device, step) -> time."""


class Span(NamedTuple):
    """A step with the times between which it runs."""

    step: Step
    start: float
    end: float


Timeline = tuple[tuple[Span, ...], ...]
"""The spans of each device, in its order."""


class Need(NamedTuple):
    """What an operation waits for."""

    kinds: tuple[Kind, ...]
    """One of these kinds,"""
    microbatch: int
    """of this micro-batch,"""
    place: Place
    """at this place."""


TO_INPUT = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


def needs(schedule: PipelineSchedule, device: int, operation: Operation) -> Iterator[Need]:
    """F waits for the piece before, Bi for the piece after and its own F, W for its own Bi."""
    kind, microbatch, chunk = operation
    here = Place(device, chunk)
    path = schedule.path_of(microbatch)
    piece = schedule.positions[here]
    if kind == Kind.FORWARD:
        if piece > 0:
            yield Need((Kind.FORWARD,), microbatch, path[piece - 1])
    elif kind == Kind.BACKWARD_WEIGHT:
        yield Need((Kind.BACKWARD_INPUT,), microbatch, here)
    else:
        yield Need((Kind.FORWARD,), microbatch, here)
        if piece + 1 < len(path):
            yield Need(TO_INPUT, microbatch, path[piece + 1])


class _Clock:
    """The ends of all operations that have run so far."""

    def __init__(self, schedule: PipelineSchedule, delay: float) -> None:
        self.schedule = schedule
        self.delay = delay
        self.ends: dict[tuple[Kind, int, Place], float] = {}

    def ready(self, device: int, step: Step) -> float | None:
        """The time from which all inputs of a step are on its device. None: not known yet."""
        latest = 0.0
        for operation in step:
            for need in needs(self.schedule, device, operation):
                end = self._arrival(need, device)
                if end is None:
                    return None
                latest = max(latest, end)
        return latest

    def _arrival(self, need: Need, device: int) -> float | None:
        delay = self.delay if need.place.device != device else 0.0
        for kind in need.kinds:
            end = self.ends.get((kind, need.microbatch, need.place))
            if end is not None:
                return end + delay
        return None

    def note(self, device: int, step: Step, end: float) -> None:
        """A step has ended."""
        for kind, microbatch, chunk in step:
            self.ends[kind, microbatch, Place(device, chunk)] = end


def run_orders(schedule: PipelineSchedule, duration: Duration, delay: float = 0.0) -> Timeline:
    """Every device's steps as early as its order and its inputs allow.

    A message takes `delay` from the end of a step to the other device. It keeps no device busy.
    UserError: the orders wait for each other in a circle.
    """
    clock = _Clock(schedule, delay)
    spans: list[list[Span]] = [[] for _ in schedule.orders]
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(schedule.orders):
            while len(spans[device]) < len(order):
                step = order[len(spans[device])]
                ready = clock.ready(device, step)
                if ready is None:
                    break
                start = max(ready, spans[device][-1].end if spans[device] else 0.0)
                end = start + duration(device, step)
                spans[device].append(Span(step, start, end))
                clock.note(device, step, end)
                moved = True
    for device, order in enumerate(schedule.orders):
        if len(spans[device]) < len(order):
            stuck = order[len(spans[device])][0]
            raise UserError(
                f"{schedule.name}: deadlock, device {device} waits for ever to do the {stuck}"
            )
    return tuple(tuple(one) for one in spans)
