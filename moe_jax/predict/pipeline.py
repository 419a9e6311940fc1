"""What each device of a pipeline does in a step, from the program that all of them share.

In every tick a device looks up which kind of step it does (parallel.executor). So the program has
one loop of at most one turn for each kind, and for what the first or the last piece alone does. How
often each device runs them is known from the schedule (parallel.ticks):

    step = what lies outside of the ticks + ticks (messages, …) + sum of the ticks' longest steps
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_jax.base.errors import UserError
from moe_jax.parallel.executor.device import FIRST, FIRST_GRADIENT, LAST, NAMES
from moe_jax.parallel.executor.placement import piece_numbers
from moe_jax.parallel.schedules import Kind, PipelineSchedule
from moe_jax.parallel.ticks import IDLE, NONE, TickTable, tick_table
from moe_jax.predict.schedule import Compute, Loop, Schedule, Step, Ticks
from moe_jax.predict.traffic import walk


class Doing(NamedTuple):
    """A kind of step of a device, with what it does as the first or the last piece."""

    kind: int
    scopes: frozenset[str] = frozenset()
    """Of FIRST, FIRST_GRADIENT and LAST, those that run."""


def with_ticks(program: Schedule, schedule: PipelineSchedule) -> Schedule:
    """The program of the busiest device, with the schedule's ticks in place of run-time decisions.

    UserError: the program has no ticks.
    """
    table = tick_table(schedule)
    doings = doings_of(table, schedule)
    inside, steps_of_kind = _tick_body(program)
    parts = _Parts(program, {})
    bodies = {
        doing: parts.variant(steps_of_kind[NAMES[doing.kind]], doing.scopes)
        for doing in {doing for row in doings for doing in row if doing}
    }
    steps = {**program.steps, **parts.steps}
    # Once in every tick: messages, and what stores them.
    steps[inside] = [step for step in steps[inside] if not _is_of_kind(step)]
    found = Schedule(steps, program.entry)
    own = max(_devices(doings), key=lambda counts: _flops(found, bodies, counts))
    ticks = Ticks(
        name="ticks",
        own=tuple((bodies[doing], count) for doing, count in own.items()),
        meetings=tuple(
            Counter(frozenset(bodies[d] for d in row if d) for row in doings if any(row)).items()
        ),
    )
    around, place = _loop_around(program, inside)
    steps[around] = [*steps[around][: place + 1], ticks, *steps[around][place + 1 :]]
    return found


def doings_of(table: TickTable, schedule: PipelineSchedule) -> list[list[Doing | None]]:
    """What each device does, by tick and device."""
    placement = piece_numbers(schedule)

    def piece(chunk: int, device: int) -> int:
        return NONE if chunk == NONE else int(placement[device, chunk])

    def doing(tick: int, device: int) -> Doing | None:
        kind = int(table.kinds[tick, device])
        if kind == IDLE:
            return None
        scopes = set()
        if piece(table.forward.chunk[tick, device], device) == 0:
            scopes.add(FIRST)
        back = piece(table.backward.chunk[tick, device], device)
        if kind != Kind.BACKWARD_WEIGHT:
            scopes |= {FIRST_GRADIENT} if back == 0 else set()
            scopes |= {LAST} if back == schedule.pieces - 1 else set()
        return Doing(kind, frozenset(scopes))

    number, devices = table.kinds.shape
    return [[doing(tick, device) for device in range(devices)] for tick in range(number)]


def _devices(doings: list[list[Doing | None]]) -> Iterator[Counter[Doing]]:
    """How often each device does what."""
    for column in zip(*doings, strict=True):
        yield Counter(doing for doing in column if doing)


def _flops(program: Schedule, bodies: dict[Doing, str], counts: Counter[Doing]) -> int:
    return sum(
        count * turns * step.work.flops
        for doing, count in counts.items()
        for step, turns in walk(program, bodies[doing])
        if isinstance(step, Compute)
    )


def _is_of_kind(step: Step) -> bool:
    return isinstance(step, Loop) and not step.turns and step.scope in NAMES.values()


def _tick_body(program: Schedule) -> tuple[str, dict[str, str]]:
    """(the part of the program that a tick runs, the part of each kind of step by its name)"""
    for name, steps in program.steps.items():
        found = {s.scope: s.bodies[0] for s in steps if isinstance(s, Loop) and _is_of_kind(s)}
        if found:
            return name, found
    raise UserError("no ticks in the compiled pipeline: this version of jaxlib is not known here")


def _loop_around(program: Schedule, body: str) -> tuple[str, int]:
    """(the part with the loop that runs `body`, the loop's place in it)"""
    return next(
        (name, place)
        for name, steps in program.steps.items()
        for place, step in enumerate(steps)
        if isinstance(step, Loop) and body in step.bodies
    )


@dataclass(frozen=True)
class _Parts:
    """Copies of parts of a program in which run-time decisions are taken."""

    program: Schedule
    steps: dict[str, list[Step]]
    """Of the copies."""

    def variant(self, name: str, scopes: frozenset[str]) -> str:
        """The name of the copy of a part, and of all parts in it."""
        copy = "@".join([name, *sorted(scopes)]) + "@"
        if copy not in self.steps:
            self.steps[copy] = []
            self.steps[copy] += [self._taken(step, scopes) for step in self.program.steps[name]]
        return copy

    def _taken(self, step: Step, scopes: frozenset[str]) -> Step:
        if not isinstance(step, Loop):
            return step
        bodies = step.bodies
        turns = step.turns
        if step.scope in (FIRST_GRADIENT, LAST) and not turns:
            turns = int(step.scope in scopes)
        elif step.scope == FIRST and len(bodies) > 1:
            # One branch embeds tokens, the other reads a slot. The first piece does the larger one.
            choose = max if FIRST in scopes else min
            bodies = (choose(bodies, key=self._size),)
        copies = tuple(self.variant(body, scopes) for body in bodies)
        return replace(step, turns=turns, bodies=copies)

    def _size(self, name: str) -> tuple[int, int]:
        works = [s.work for s, _ in walk(self.program, name) if isinstance(s, Compute)]
        return sum(work.flops for work in works), sum(work.bytes for work in works)
