"""What the first run on an H100 should find: a prediction that is recorded before it.

    python experiments/kernel_ladder/first_run.py [--out FILE]

It writes kernels/results/predicted.json: every launch of a training step and every layer, at the
sizes of real models. A run on a GPU measures the same launches and layers, by the names of
moe_kernels.bench. So the first run tests the model as well as the kernels.

The model of our launches is moe_kernels.predict, because it follows from the kernels' own tiles and
audit. XLA's path and the calibration need moe_jax and published figures, which the kernels do not
know. So this experiment puts them together.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import Launch, missing_package
from moe_kernels.predict import (
    H100,
    forward_launches,
    launch_name,
    routing_launches,
    train_launches,
)
from moe_kernels.predict.device import VERSION
from moe_kernels.predict.layers import BACKWARD

from experiments.kernel_ladder import calibration, compiled
from experiments.kernel_ladder.calibration import Band
from experiments.kernel_ladder.cases import FIRST_RUN
from experiments.kernel_ladder.evidence import recorded_calibration
from experiments.kernel_ladder.prediction import CompiledShape, Prediction, calibrated
from experiments.kernel_ladder.ranges import Range, total
from moe_jax.base.files import write_atomically
from moe_jax.base.paths import user_path
from moe_jax.cli import parse_settings, program
from moe_jax.config import require

DEVICE_KIND = "NVIDIA H100 80GB HBM3"
"""What JAX calls an H100 SXM, so that a run knows whether it is on the predicted device."""
MOVING = ("gate", "schedule", "combine", "combine, unweighted")
"""Launches of no product."""


@dataclass(frozen=True)
class Settings:
    """Records what the first run on an H100 should find."""

    out: str = str(Path(__file__).parents[2] / "kernels/results/predicted.json")
    """The file."""
    seed: int = 0
    """Seed of the routing."""


class Shaped:
    """The predictions of one shape."""

    def __init__(self, name: str, band: Band, counts: CompiledShape, seed: int) -> None:
        self.name = name
        self.shape: Shape = FIRST_RUN[name]
        self.band = band
        self.prediction = Prediction(self.shape, H100, band, counts, seed)
        self.predictor = self.prediction.predictor

    def launches(self) -> Iterator[dict[str, Any]]:
        """A row for each launch of a training step. The launches of the schedule are one row, and
        so are the hidden gradient and the sums over its partial sums."""
        bounds: dict[str, float] = defaultdict(float)
        flops: dict[str, float] = defaultdict(float)
        recorded = [
            *routing_launches(self.shape, H100.arch),
            *train_launches(self.shape, H100.arch),
        ]
        for launch in recorded:
            time = self.predictor.time(launch)
            bounds[launch_name(launch)] += time.seconds
            flops[launch_name(launch)] += time.flops
        bounds["hidden gradient"] += self.prediction.gate_gradient().seconds
        for launch, bound in bounds.items():
            found = calibrated(bound, self.side(launch))
            yield {
                "shape": self.name,
                "launch": launch,
                "seconds_low": found.low,
                "seconds_high": found.high,
                "seconds_bound": bound,
                "flops": flops[launch],
            }

    def side(self, launch: str) -> Range:
        """The calibration band of a launch. One that only moves may be as fast as its bound."""
        band = self.band.backward if launch in BACKWARD else self.band.forward
        return Range(band.low, 1.0) if launch in MOVING else band

    def layers(self) -> Iterator[dict[str, Any]]:
        """A row for each implementation, forward and forward with backward. All begin with the
        schedule, as the benchmark's layers do."""
        plan = self.of_launches(
            [x for x in routing_launches(self.shape, H100.arch) if launch_name(x) == "schedule"]
        )
        own = {
            "forward": self.of_launches(forward_launches(self.shape, H100.arch)),
            "train": self.prediction.train().seconds,
        }
        for kind, seconds in own.items():
            yield self.layer("triton", kind, total([plan, seconds]))
            for peer in ("xla", "ragged_dot"):
                step = self.prediction.of_peer(peer, kind)
                if not step.left_out:
                    row = self.layer(peer, kind, total([plan, step.seconds]))
                    yield row | {"note": step.note}

    def left_out(self) -> Iterator[dict[str, str]]:
        """A row for each layer that does not fit into the device's memory."""
        for kind in ("forward", "train"):
            if reason := self.prediction.of_peer("ragged_dot", kind).left_out:
                row = {"shape": self.name, "kind": kind, "implementation": "ragged_dot"}
                yield row | {"reason": reason}

    def layer(self, implementation: str, kind: str, seconds: Range) -> dict[str, Any]:
        """One row."""
        return {
            "shape": self.name,
            "kind": kind,
            "implementation": implementation,
            "seconds_low": seconds.low,
            "seconds_high": seconds.high,
            "flops": self.shape.flops * (3 if kind == "train" else 1),
        }

    def of_launches(self, launches: list[Launch]) -> Range:
        """The sum of the launches of a forward pass."""
        bound = sum(self.predictor.time(launch).seconds for launch in launches)
        return calibrated(bound, self.band.forward)


def predicted(counts: compiled.Counts, band: Band, seed: int) -> dict[str, Any]:
    """The content of the file."""
    shapes = [Shaped(name, band, counts[name], seed) for name in counts]
    return {
        "what": "PREDICTED before any run on a GPU. seconds_low and seconds_high hold the times of "
        "a kernel between ScatterMoE's and SonicMoE's distance from the model's bound.",
        "model": VERSION,
        "date": datetime.now(UTC).date().isoformat(),
        "device": DEVICE_KIND,
        "dtype": "bfloat16",
        "calibration": {kind: list(getattr(band, kind)) for kind in calibration.KINDS},
        "launches": [row for shape in shapes for row in shape.launches()],
        "layers": [row for shape in shapes for row in shape.layers()],
        "left_out": [row for shape in shapes for row in shape.left_out()],
    }


def main(argv: list[str]) -> None:
    """Predicts and writes."""
    settings = parse_settings(Settings(), argv, "What should the first run on an H100 find?")
    problem = missing_package()
    require(not problem, f"the prediction compiles kernels: {problem}")
    points = recorded_calibration()
    recorded = compiled.read_recorded()
    missing = [name for name in FIRST_RUN if name not in recorded]
    require(not missing, f"no counts of {missing} in {compiled.RECORDED.name}: run run.py first")
    counts = {name: recorded[name] for name in FIRST_RUN}
    content = predicted(counts, calibration.band_of(points), settings.seed)
    path = user_path(settings.out)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    for row in content["layers"]:
        name = f"{row['shape']} {row['kind']} {row['implementation']}"
        low = 1e3 * row["seconds_low"]
        high = 1e3 * row["seconds_high"]
        print(f"{name:44} {low:10.3f} to {high:10.3f} ms, PREDICTED")
    print(path)


if __name__ == "__main__":
    program(main)
