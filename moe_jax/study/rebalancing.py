"""Training runs that place their experts on simulated devices by load, and the loads counted."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moe_jax.base.errors import require
from moe_jax.base.result import Measurement
from moe_jax.placement.eplb import device_loads, imbalance, placement_of
from moe_jax.train.metrics import read_lines

UNIT = "highest / mean load of the devices, counted"


@dataclass(frozen=True)
class Settings:
    """Trains on simulated devices and counts the load of each."""

    out: str = "runs/rebalancing"
    """Folder for result.json, the plot and the runs."""
    seed: int = 0
    """Seed of the model."""
    steps: int = 100
    """Updates of each run. At most 199: a longer run does not write all loads."""
    rebalance: int = 10
    """Steps between two placements."""
    devices: int = 4
    """Simulated devices, of which each has a slot for a replica."""
    moves: int = 2
    """Experts of a layer that may come to another device at a time, in the run with a bound."""
    quick: bool = False
    """25 steps, placed anew every 5."""

    def __post_init__(self) -> None:
        require(
            self.every < self.steps < 200,
            f"steps={self.steps} must be above rebalance={self.rebalance} and below 200",
        )

    @property
    def every(self) -> int:
        """Steps between two placements."""
        return 5 if self.quick else self.rebalance


class Loads(NamedTuple):
    """The highest over the mean load of the devices at every step, counted."""

    before: Float[np.ndarray, "count layers"]
    """Experts in the order of their numbers, no replicas."""
    after: Float[np.ndarray, "count layers"]
    """As the run placed them."""
    moved: Float[np.ndarray, "count"]
    """Experts of a layer that came to another device, mean over layers."""


def options(settings: Settings, moves: int) -> dict[str, int | str]:
    """The settings of a run that differ from the preset's."""
    steps = 25 if settings.quick else settings.steps
    return {
        "seed": settings.seed,
        "steps": steps,
        "evaluate_every": steps,
        "samples": 0,
        "data.tokenizer": "bytes",
        "data.validation_tokens": 5000,
        "model.moe.experts": 32,
        "model.moe.experts_per_token": 4,
        "parallel.expert": settings.devices,
        "parallel.fake_devices": settings.devices,
        "parallel.exchange.rebalance": settings.every,
        "parallel.exchange.replicas": settings.devices,
        "parallel.exchange.moves": moves,
    }


def train(script: Path, out: Path, settings: Settings, moves: int) -> Loads:
    """The loads of a run of the script with this bound on moves. A run that was killed goes on."""
    folder = out / f"run-{settings.seed}-moves{moves}{'-quick' * settings.quick}"
    command = [sys.executable, str(script), "tiny", "--out", str(folder)]
    for name, value in options(settings, moves).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    return loads_of(folder / "metrics.jsonl", settings.devices)


def loads_of(path: Path, devices: int) -> Loads:
    """The loads in a run's metrics."""
    lines = list(read_lines(path))
    loads = np.array([line["load"] for line in lines])
    layers, experts = loads.shape[1:]
    in_order = placement_of(np.tile(np.arange(experts), (layers, 1)), experts)
    before = np.stack([imbalance(device_loads(load, in_order, devices)) for load in loads])
    after = np.array([line["device_imbalance"] for line in lines])
    moved = [line["experts_moved"] / layers for line in lines if "experts_moved" in line]
    return Loads(before, after, np.array(moved))


def measurements(free: Loads, bounded: Loads, every: int, seed: int) -> list[Measurement]:
    """Means over layers and over the steps after the first placement by load."""
    before = float(free.before[every:].mean())
    rows = [Measurement("eplb_load_before", before, UNIT, seeds=[seed])]
    for name, loads in (("eplb_load_after", free), ("eplb_load_bounded", bounded)):
        value = float(loads.after[every:].mean())
        rows.append(
            Measurement(name, value, UNIT, "eplb_load_before", value / before, seeds=[seed])
        )
    for name, loads in (("eplb_moved", free), ("eplb_moved_bounded", bounded)):
        rows.append(
            Measurement(
                name, float(loads.moved.mean()), "experts a layer and placement", seeds=[seed]
            )
        )
    return rows


def draw(free: Loads, bounded: Loads, every: int) -> Figure:
    """The mean over layers, step by step, with a line where experts are first placed by load."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(free.before) + 1)
    axes.plot(steps, free.before.mean(-1), label="in order, no replicas", color="C7")
    axes.plot(steps, bounded.after.mean(-1), label="few moves at a time, replicas", color="C1")
    axes.plot(steps, free.after.mean(-1), label="a whole new plan, replicas", color="C0")
    axes.axvline(every, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(f"step (experts are placed anew every {every} steps)")
    axes.set_ylabel("highest / mean load of the devices")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Load of devices in training, mean over layers")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def measure(script: Path, settings: Settings, out: Path) -> tuple[list[Measurement], Figure]:
    """Both runs of the training script."""
    free = train(script, out, settings, 0)
    bounded = train(script, out, settings, settings.moves)
    every = settings.every
    return measurements(free, bounded, every, settings.seed), draw(free, bounded, every)
