"""How even is the load of devices in a training run that places its experts by load?

    python experiments/rebalancing.py [--out DIR] [--quick]

`train.py` trains `tiny` with 32 experts on four simulated devices of the axis `expert`. Every few
steps the experts are placed anew, and each device has a slot for a replica. `metrics.jsonl` has the
assignments that the device with the most computed, over the mean, counted in the exchange itself
(device_imbalance). It also has each expert's load, which gives what the same tokens are without
replicas, in the order of the experts' numbers. Loads are counted and not timed: simulated devices
share the cores.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moe_jax.base.errors import require
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.placement.eplb import device_loads, imbalance, placement_of
from moe_jax.study.results import publish
from moe_jax.train.metrics import read_lines

QUESTION = "How even is the load of devices in training that places experts by load?"
UNIT = "highest / mean load of the devices, counted"
TRAIN = Path(__file__).with_name("train.py")


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

    before: Float[np.ndarray, "N layers"]
    """Experts in the order of their numbers, no replicas."""
    after: Float[np.ndarray, "N layers"]
    """As the run placed them."""
    moved: Float[np.ndarray, "N"]
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


def train(out: Path, settings: Settings, moves: int) -> Loads:
    """The loads of a run with this bound on moves. A run that was killed goes on."""
    folder = out / f"run-{settings.seed}-moves{moves}{'-quick' * settings.quick}"
    command = [sys.executable, str(TRAIN), "tiny", "--out", str(folder)]
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


def verdict(values: Mapping[str, float | int | None]) -> str:
    """The answer, in sentences."""
    return (
        f"In the order of the experts' numbers the device with the most load has "
        f"{values['eplb_load_before']:.2f} times the mean. Placed anew by the loads of the steps "
        f"before, with a replica's slot a device, it has {values['eplb_load_after']:.2f}, or "
        f"{values['eplb_load_bounded']:.2f} by {values['eplb_moved_bounded']:.1f} moves a layer "
        f"instead of {values['eplb_moved']:.1f}."
    )


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


def measure(settings: Settings, out: Path) -> tuple[list[Measurement], Figure]:
    """Trains both runs."""
    free = train(out, settings, 0)
    bounded = train(out, settings, settings.moves)
    every = settings.every
    return measurements(free, bounded, every, settings.seed), draw(free, bounded, every)


def main(argv: list[str]) -> None:
    """Trains, counts, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    rows, figure = measure(settings, out)
    publish(
        out,
        experiment="rebalancing",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={"rebalancing": figure},
    )


if __name__ == "__main__":
    program(main)
