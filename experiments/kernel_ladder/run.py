"""Lever 1: what does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?

    python experiments/kernel_ladder/run.py [--out DIR] [--quick] [--device H100|A100]

The layer forward, from jax.lax.ragged_dot and XLA's own path to the full kernels, one idea at a
time (rungs.py), and all ideas with the backward pass, on the sizes of real models. Every number is
a range. On a GPU every rung is measured. Without one it is PREDICTED, and labelled so everywhere:
each launch is compiled for the GPU that is not there and timed by a model (moe_kernels.predict).
The model is a bound. Published kernels say how far below it real ones run (calibration.py).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import missing_package, triton_support
from moe_kernels.predict import DEVICES, H100, Device

from experiments.kernel_ladder import compiled
from experiments.kernel_ladder.cases import QUICK, SHAPES
from experiments.kernel_ladder.evidence import Evidence, evidence_measurements
from experiments.kernel_ladder.figure import draw
from experiments.kernel_ladder.gains import (
    TRAIN,
    Gain,
    Gains,
    gain_measurements,
    key,
    measured_gains,
    measured_train,
    predicted_gains,
    predicted_train,
    recorded_gains,
)
from experiments.kernel_ladder.measurement import measure, speed_without_y
from experiments.kernel_ladder.prediction import Kept, Prediction, without_y
from experiments.kernel_ladder.ranges import Range, Step
from experiments.kernel_ladder.rungs import RUNGS
from experiments.kernel_ladder.verdict import verdict
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.study.live_table import LiveTable
from moe_jax.study.plots import save_figures
from moe_jax.study.results import publish, read_measurements

QUESTION = "What does each kernel idea buy, and is it the article's 2-5x, or 4-10x with PTX?"
ROUNDS = 7


@dataclass(frozen=True)
class Settings:
    """Climbs the ladder from ragged_dot and XLA's own path to the kernels."""

    out: str = "runs/kernel-ladder"
    """Folder for result.json, metrics.jsonl, calibration.json, compiled_h100.json and the plot."""
    quick: bool = False
    """One small shape, by the recorded calibration and counts."""
    model: str = ""
    """One of the models alone."""
    device: Literal["H100", "A100"] = "H100"
    """The GPU that the prediction is for, where none is there."""
    seed: int = 0
    """Seed of the routing and, on a GPU, of the inputs."""
    recorded: str = ""
    """A result.json of this command, whose plot is drawn again. Nothing is measured then."""


class Ladder:
    """Climbs shape by shape, and collects rows and measurements."""

    def __init__(self, settings: Settings, table: LiveTable, out: Path) -> None:
        self.seed = settings.seed
        self.device: Device = DEVICES[settings.device]
        self.on_gpu = triton_support().name == "gpu"
        self.kind = "measured" if self.on_gpu else "PREDICTED"
        self.label = f"PREDICTED for {self.device.name}, no GPU was there"
        if self.on_gpu:
            self.label = f"measured on {jax.devices()[0].device_kind}"
        self.table = table
        self.measurements: list[Measurement] = []
        self.evidence = None
        if not self.on_gpu:
            # SonicMoE's and ScatterMoE's figures are of an H100. The A100 takes their record.
            anew = not settings.quick
            self.evidence = Evidence(
                out,
                calibrate=anew and settings.device == "H100",
                count=anew and compiled.can_compile(),
                seed=settings.seed,
            )
            self.measurements += evidence_measurements(self.evidence.band)

    def climb(self, name: str, shape: Shape) -> Gains:
        """All rungs of one shape, and forward with backward."""
        steps, found, kept = self.measured(shape) if self.on_gpu else self.predicted(name, shape)
        for rung, step in steps.items():
            if step.left_out:
                print(f"\n{name}: {rung} left out: {step.left_out}", flush=True)
        for rung in (*(rung.name for rung in RUNGS), TRAIN):
            if rung in found:
                self.add(name, rung, steps[rung], found[rung])
        self.add_kept(name, kept)
        return found

    def measured(self, shape: Shape) -> tuple[dict[str, Step], Gains, Kept]:
        """Times on the GPU at hand."""
        steps, seconds = measure(shape, self.seed, ROUNDS)
        found = measured_gains(seconds)
        kept = without_y(shape, None, self.device)
        if "raster train" in seconds:
            found[TRAIN] = measured_train(seconds)
            times = seconds["raster train"]
            steps[TRAIN] = Step(Range(min(times), max(times)))
        return steps, found, kept._replace(speedup=speed_without_y(seconds))

    def predicted(self, name: str, shape: Shape) -> tuple[dict[str, Step], Gains, Kept]:
        """Times of a GPU that is not there."""
        assert self.evidence
        counts = self.evidence.counts[name]
        prediction = Prediction(shape, self.device, self.evidence.band, counts, self.seed)
        limit = shape.flops / self.device.gemm
        steps = prediction.rungs()
        found = predicted_gains(steps, limit)
        steps[TRAIN] = prediction.train()
        peers = {peer: prediction.of_peer(peer, "train") for peer in counts}
        found[TRAIN] = predicted_train(steps[TRAIN], peers, limit)
        return steps, found, without_y(shape, steps[TRAIN], self.device)

    def add(self, shape: str, rung: str, step: Step, gain: Gain) -> None:
        """The row and the measurements of one rung."""
        over_xla = gain.over_xla or (None, None)
        over_ragged = gain.over_ragged_dot or (None, None)
        self.table.row(
            f"{shape}, {self.label}",
            rung,
            step.note,
            ms_low=1e3 * step.seconds.low,
            ms_high=1e3 * step.seconds.high,
            of_gemm_low=gain.of_gemm.low,
            of_gemm_high=gain.of_gemm.high,
            of_gemm_at_most=gain.of_gemm_bound,
            over_xla_low=over_xla[0],
            over_xla_high=over_xla[1],
            over_ragged_low=over_ragged[0],
            over_ragged_high=over_ragged[1],
        )
        self.measurements += gain_measurements(shape, rung, gain, self.kind)

    def add_kept(self, name: str, kept: Kept) -> None:
        """The gain of a backward pass that does not need the second product's output y."""
        low, high = kept.speedup or (None, None)
        saved = kept.gigabytes_with_y / kept.gigabytes
        self.table.row(
            f"{name}, backward",
            "without Y",
            self.label,
            speed_low=low,
            speed_high=high,
            kept_GB=kept.gigabytes,
            kept_GB_with_Y=kept.gigabytes_with_y,
        )
        row = key(f"{name} backward without y")
        unit = f"x with Y kept, {self.kind}"
        saved_unit = "bytes kept with Y over those without, by the formula"
        self.measurements += [
            Measurement(f"{row}_low", low, unit, "with Y", low),
            Measurement(f"{row}_high", high, unit, "with Y", high),
            Measurement(f"{row}_memory", saved, saved_unit, "with Y", saved),
        ]


def published_gemm(label: str) -> float | None:
    """The plain GEMM's FLOP/s where the ladder's device is the published kernels'."""
    return H100.gemm if "H100" in label else None


def draw_recorded(path: Path, out: Path) -> None:
    """Draws out/plots/ladder.png from a recorded result, with the title that its verdict has."""
    require(path.is_file(), f"--recorded '{path}' is not there: give the path of a result.json")
    rows = read_measurements(path)
    shapes = [name for name in {**SHAPES, **QUICK} if key(f"{name} xla") + "_low" in rows]
    require(bool(shapes), f"--recorded '{path}' is no result of this command")
    title = re.split(r"\. ", json.loads(path.read_text())["verdict"])[0]
    figure = draw(recorded_gains(rows, shapes), title, published_gemm(title))
    save_figures({"ladder": figure}, out / "plots", out.resolve().name)
    print(f"{out}/plots/ladder.png")


def main(argv: list[str]) -> None:
    """Climbs, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    problem = missing_package()
    require(not problem, f"the ladder compiles kernels: {problem}")
    out = output_folder(settings.out)
    if settings.recorded:
        draw_recorded(Path(settings.recorded).expanduser(), out)
        return
    shapes = QUICK if settings.quick else SHAPES
    if settings.model:
        require(settings.model in SHAPES, f"--model '{settings.model}' is none of {[*SHAPES]}")
        shapes = {settings.model: SHAPES[settings.model]}
    ladder = Ladder(settings, LiveTable(out / "metrics.jsonl"), out)
    found = {name: ladder.climb(name, shape) for name, shape in shapes.items()}
    print()
    publish(
        out,
        experiment="kernel_ladder",
        question=QUESTION,
        settings=settings,
        measurements=ladder.measurements,
        verdict=verdict(found, ladder.label),
        figures={"ladder": draw(found, ladder.label, published_gemm(ladder.label))},
    )


if __name__ == "__main__":
    program(main)
