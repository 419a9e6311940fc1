"""Totals of a scheduled program: FLOPs, and bytes of collectives by kind and by axis."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.predict.collectives import sent_bytes
from moe_jax.predict.schedule import Compute, Loop, Schedule, Start, Step, Ticks


def walk(schedule: Schedule, name: str = "", times: int = 1) -> Iterator[tuple[Step, int]]:
    """Every step with the number of times that it runs. Of a condition, its largest branch."""
    for step in schedule.steps[name or schedule.entry]:
        if isinstance(step, Loop):
            largest = max(step.bodies, key=lambda body: _size(schedule, body))
            yield from walk(schedule, largest, times * step.turns)
        elif isinstance(step, Ticks):
            for body, turns in step.own:
                yield from walk(schedule, body, times * turns)
        else:
            yield step, times


def _size(schedule: Schedule, body: str) -> tuple[int, int]:
    works = [step.work for step, _ in walk(schedule, body) if isinstance(step, Compute)]
    return sum(work.flops for work in works), sum(work.bytes for work in works)


def total_flops(schedule: Schedule) -> int:
    """FLOPs of all products on one device, recomputation and padding included."""
    return sum(n * step.work.flops for step, n in walk(schedule) if isinstance(step, Compute))


def collective_bytes(schedule: Schedule, mesh: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Bytes that a device sends, by (kind, axes). `mesh` has the sizes of axes, outermost first."""
    found: dict[tuple[str, str], int] = {}
    for step, times in walk(schedule):
        if isinstance(step, Start):
            key = (step.kind, axes_of(step, mesh))
            size = 2 if step.kind == "collective-permute" else len(step.devices)
            sent = times * sent_bytes(step.kind, step.size, size)
            found[key] = found.get(key, 0) + round(sent)
    return found


def axes_of(start: Start, mesh: Mapping[str, int]) -> str:
    """The axes along which the devices of a transfer differ: `fsdp`, or `data+fsdp`."""
    if not mesh:
        return "none"
    devices = start.devices[:2] if start.kind == "collective-permute" else start.devices
    if max(devices, default=0) >= math.prod(mesh.values()):
        return "unknown"
    places = np.array(np.unravel_index(np.array(devices, int), tuple(mesh.values())))
    names = [name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(names) or "none"
