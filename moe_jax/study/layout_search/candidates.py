"""Layouts, micro-batches, schedules and rematerialisation that a search may choose from."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from moe_jax.config import TrainConfig, fields
from moe_jax.config.parallel import Schedule

AXES: tuple[str, ...] = ("fsdp", "expert", "tensor", "pipe")
MOST = {"tensor": 8, "pipe": 16}
"""Devices of an axis at the most. The others may have all."""
SCHEDULES = [name for name in get_args(Schedule) if name not in ("gpipe", "zb-h2")]
"""gpipe and zb-h2 keep more activations than others that are as fast."""
REMAT = ("none", "dots", "full")
PARTS = (1, 2, 4, 8, 16)
"""Micro-batches of an update."""
PARTS_OF_STAGE = (2, 4, 8)
"""Micro-batches of an update for each device of a pipeline."""
SEARCHED = (
    *(f"parallel.{axis}" for axis in AXES),
    *("parallel.schedule", "parallel.microbatches", "optim.accumulation", "model.remat"),
)


@dataclass(frozen=True)
class Candidate:
    """Fields that are set, and how it is called."""

    options: Mapping[str, Any]
    """By dotted names."""

    @property
    def name(self) -> str:
        """`expert8-pipe4-zb-h1-microbatches8-full`."""
        words = [
            f"{field.rpartition('.')[2]}{value}" if isinstance(value, int) else str(value)
            for field, value in self.options.items()
            if value != 1
        ]
        return "-".join(words)

    @property
    def axes(self) -> tuple[Any, ...]:
        """Sizes of the axes."""
        return tuple(self.options.get(f"parallel.{axis}") for axis in AXES)

    def of(self, config: TrainConfig) -> TrainConfig:
        """The run with these fields. UserError: they do not go together."""
        parts: dict[str, dict[str, Any]] = {}
        for field, value in self.options.items():
            owner, _, leaf = field.partition(".")
            parts.setdefault(owner, {})[leaf] = value
        changed = {owner: replace(getattr(config, owner), **own) for owner, own in parts.items()}
        return replace(config, **changed)


def candidates(config: TrainConfig, devices: int, kept: Collection[str]) -> Iterator[Candidate]:
    """All that fill the devices and split the batch evenly. `kept` are fields that stay as set."""
    given = fields(config)
    sizes = [
        [given[f"parallel.{axis}"]]
        if f"parallel.{axis}" in kept
        else [n for n in divisors(devices) if n <= MOST.get(axis, devices)]
        for axis in AXES
    ]
    for chosen in itertools.product(*sizes):
        axes = dict(zip(AXES, chosen, strict=True))
        if _impossible(config, axes, devices):
            continue
        for ways in _ways(config, axes, devices, kept):
            for remat in [given["model.remat"]] if "model.remat" in kept else REMAT:
                layout = {f"parallel.{axis}": size for axis, size in axes.items()}
                yield Candidate({**layout, **ways, "model.remat": remat})


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _impossible(config: TrainConfig, axes: Mapping[str, int], devices: int) -> bool:
    """Layouts that are no layouts: a product that is too large, experts that do not divide."""
    used = axes["fsdp"] * axes["expert"] * axes["tensor"] * axes["pipe"]
    experts = config.model.moe.experts if config.model.moe_layers else 1
    data = config.parallel.data
    return (
        devices % used > 0
        or (data > 0 and data * used != devices)
        or experts % axes["expert"] > 0
        or (axes["pipe"] > 1 and axes["tensor"] > 1)
    )


def _ways(
    config: TrainConfig, axes: Mapping[str, int], devices: int, kept: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Schedules and micro-batches of a pipeline, or micro-batches without one."""
    given = fields(config)
    rows = devices // axes["pipe"] // axes["tensor"]
    if axes["pipe"] == 1:
        name = "optim.accumulation"
        for parts in [given[name]] if name in kept else PARTS:
            if config.batch % (parts * rows) == 0:
                yield {name: parts}
        return
    name = "parallel.microbatches"
    schedules = [given["parallel.schedule"]] if "parallel.schedule" in kept else SCHEDULES
    for schedule in schedules:
        for parts in [given[name]] if name in kept else [axes["pipe"] * n for n in PARTS_OF_STAGE]:
            if config.batch % (parts * rows) == 0:
                yield {"parallel.schedule": schedule, name: parts, "optim.accumulation": 1}
