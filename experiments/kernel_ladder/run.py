"""Lever 1: what does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?

    python experiments/kernel_ladder/run.py [--out DIR] [--quick] [--device H100|A100]

The layer forward, from XLA's own path to the full kernels, one idea at a time (rungs.py), on the
sizes of real models. On a GPU every rung is measured. Without one it is PREDICTED, and labelled so
everywhere: each rung's launches are compiled for the GPU that is not there, and their registers,
shared memory and instructions go into the model of launch_model.py.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from moe_kernels.launch import missing_package, triton_support

from experiments.kernel_ladder.cases import QUICK, SHAPES, Shape
from experiments.kernel_ladder.launch_model import DEVICES, Device
from experiments.kernel_ladder.measurement import backward_speedup, measure
from experiments.kernel_ladder.prediction import Backward, backward, predict
from experiments.kernel_ladder.report import Gains, draw, gains, key, rung_measurements, verdict
from experiments.kernel_ladder.rungs import RUNGS
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.study.live_table import LiveTable
from moe_jax.study.results import publish

QUESTION = "What does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?"
ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """Climbs the ladder from XLA's own path to the kernels."""

    out: str = "runs/kernel-ladder"
    """Folder for result.json, metrics.jsonl and the plot."""
    quick: bool = False
    """One small shape."""
    device: Literal["H100", "A100"] = "H100"
    """The GPU that the prediction is for, where none is there."""
    seed: int = 0
    """Seed of the routing and, on a GPU, of the inputs."""


class Ladder:
    """Climbs shape by shape, and collects rows and measurements."""

    def __init__(self, settings: Settings, table: LiveTable) -> None:
        self.seed = settings.seed
        self.device: Device = DEVICES[settings.device]
        self.on_gpu = triton_support().name == "gpu"
        self.kind = "measured" if self.on_gpu else "PREDICTED"
        self.label = f"PREDICTED for {self.device.name}, no GPU was there"
        if self.on_gpu:
            self.label = f"measured on {jax.devices()[0].device_kind}"
        self.table = table
        self.measurements: list[Measurement] = []

    def climb(self, name: str, shape: Shape) -> Gains:
        """All rungs of one shape."""
        if self.on_gpu:
            steps, seconds = measure(shape, self.seed, ROUNDS)
            limit = 1e3 * float(np.median(seconds["gemm"]))
        else:
            steps = predict(shape, self.device, self.seed)
            seconds = {}
            limit = 1e3 * shape.flops / self.device.gemm
        found = gains(steps, seconds)
        for rung in (rung for rung in RUNGS if rung.name in steps):
            step = steps[rung.name]
            over_before, over_xla = found[rung.name]
            of_gemm = limit / step.milliseconds
            self.table.row(
                f"{name}, {self.label}",
                rung.name,
                step.note,
                ms=step.milliseconds,
                of_gemm=of_gemm,
                over_before=over_before,
                over_xla=over_xla,
                DRAM_GB=step.dram_gigabytes,
            )
            self.measurements += rung_measurements(
                name, rung.name, over_xla=over_xla, of_gemm=of_gemm, kind=self.kind
            )
        buys = backward(shape, steps["raster"], self.device)
        if self.on_gpu:
            buys = buys._replace(speedup=backward_speedup(shape, self.seed, ROUNDS))
        self.add_backward(name, buys)
        return found

    def add_backward(self, name: str, buys: Backward) -> None:
        """The gain of a backward pass that does not need the second product's output y."""
        self.table.row(f"{name}, backward", "without Y", self.label, **buys._asdict())
        row = key(f"{name} backward without y")
        unit = f"x with Y kept, {self.kind}"
        saved = buys.kept_with_y / buys.kept_gigabytes
        saved_unit = "bytes kept with Y over those without, by the formula"
        self.measurements += [
            Measurement(row, buys.speedup, unit, "with Y", buys.speedup),
            Measurement(f"{row}_memory", saved, saved_unit, "with Y", saved),
        ]


def main(argv: list[str]) -> None:
    """Climbs, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    problem = missing_package()
    require(not problem, f"the ladder compiles kernels: {problem}")
    out = output_folder(settings.out)
    ladder = Ladder(settings, LiveTable(out / "metrics.jsonl"))
    shapes = QUICK if settings.quick else SHAPES
    found = {name: ladder.climb(name, shape) for name, shape in shapes.items()}
    print()
    publish(
        out,
        experiment="kernel_ladder",
        question=QUESTION,
        settings=settings,
        measurements=ladder.measurements,
        verdict=verdict(found, ladder.label),
        figures={"ladder": draw(found, ladder.label)},
    )


if __name__ == "__main__":
    program(main)
