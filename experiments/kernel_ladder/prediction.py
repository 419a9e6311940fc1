"""The rungs without a GPU: compiled for one that is not there, and timed by moe_kernels.predict.

Everything here is a prediction, and every time is a range.
"""

from typing import NamedTuple

import jax
from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import Launch, recording
from moe_kernels.predict import (
    Device,
    LaunchTime,
    Predictor,
    balanced_routing,
    launch_name,
    train_launches,
)
from moe_kernels.predict.device import other_seconds
from moe_kernels.predict.layers import BACKWARD
from moe_kernels.schedule.api import schedule_shape

from experiments.kernel_ladder.calibration import Band
from experiments.kernel_ladder.cases import DTYPE, layer_arrays
from experiments.kernel_ladder.program_text import Counted
from experiments.kernel_ladder.ragged_path import predict_ragged
from experiments.kernel_ladder.ranges import Range, Step
from experiments.kernel_ladder.rungs import Rung, built, possible
from experiments.kernel_ladder.xla_path import predict_xla

CompiledShape = dict[str, dict[str, Counted]]
"""By layer (`xla`, `ragged_dot`), then `forward` or `train`."""


class Moved(NamedTuple):
    """A step of XLA's own between launches of ours."""

    name: str
    bytes: float


def calibrated(bound: float, band: Range) -> Range:
    """The times in which a published kernel of this bound would run, fastest first."""
    return Range(bound / band.high, bound / band.low)


class Prediction:
    """Predicts the rungs of one shape on one device."""

    def __init__(
        self, shape: Shape, device: Device, band: Band, compiled: CompiledShape, seed: int
    ) -> None:
        self.shape = shape
        self.device = device
        self.band = band
        self.compiled = compiled
        self.predictor = Predictor(balanced_routing(shape, seed), device)

    def step(self, rung: Rung) -> Step:
        """The sum over what the rung launches, forward."""
        if rung.change is None:
            return self.of_peer(rung.name, "forward")
        launches = [self.predictor.time(launch) for launch in self.launches(rung)]
        moved = [self.predictor.of_memory(step.bytes) for step in self.between(rung)]
        return self.sum_of([*launches, *moved], self.band.forward)

    def of_peer(self, layer: str, kind: str) -> Step:
        """XLA's path or ragged_dot, forward or `train`."""
        counted = self.compiled[layer][kind]
        if layer == "ragged_dot":
            return predict_ragged(self.shape, counted, kind, self.device)
        counts = self.predictor.routing.counts
        return predict_xla(self.shape, counts, counted, kind, self.device)

    def train(self) -> Step:
        """Forward and backward with all ideas: each launch by itself, each in its own band."""
        forward = []
        backward = [self.gate_gradient()]
        for launch in train_launches(self.shape, self.device.arch):
            side = backward if launch_name(launch) in BACKWARD else forward
            side.append(self.predictor.time(launch))
        parts = [
            self.sum_of(forward, self.band.forward),
            self.sum_of(backward, self.band.backward),
        ]
        return Step(
            Range(sum(p.seconds.low for p in parts), sum(p.seconds.high for p in parts)),
            sum(p.bound or 0.0 for p in parts),
            sum(p.bound_low_l2 or 0.0 for p in parts),
            sum(p.dram_gigabytes or 0.0 for p in parts),
            "; ".join(p.note for p in parts),
        )

    def gate_gradient(self) -> LaunchTime:
        """The gate weights' gradient: XLA sums the hidden gradient's partial sums by row, and
        gathers the rows' sums by assignment."""
        partial = next(
            launch.outputs[2]
            for launch in train_launches(self.shape, self.device.arch)
            if launch_name(launch) == "hidden gradient"
        )
        assignments = self.shape.tokens * self.shape.per_token
        numbers = partial.shape[0] * partial.shape[1] + partial.shape[1] + 4 * assignments
        return self.predictor.of_memory(4.0 * numbers)

    def sum_of(self, times: list[LaunchTime], band: Range) -> Step:
        """One step of several launches."""
        bound = sum(time.seconds for time in times)
        return Step(
            calibrated(bound, band),
            bound,
            sum(time.seconds_low_l2 for time in times),
            sum(time.dram_bytes for time in times) / 1e9,
            "; ".join(time.note for time in times if time.note),
        )

    def launches(self, rung: Rung) -> list[Launch]:
        """What the rung's program launches on this device."""
        s = self.shape
        rows = self.predictor.routing.block_rows
        plan = schedule_shape(s.tokens, s.per_token, s.experts, rows)
        with recording(self.device.arch) as found, built(rung, DTYPE, rows):
            x, weights, *matrices = layer_arrays(s)
            if prepare := rung.prepare:
                with recording(self.device.arch):  # not part of a step
                    matrices = jax.eval_shape(lambda *m: prepare(*m), *matrices)
            jax.eval_shape(lambda *a: rung.layer(*a), x, weights, *matrices, plan)
        return found

    def between(self, rung: Rung) -> list[Moved]:
        """XLA's own steps between the launches, two bytes a number."""
        rows = float(self.predictor.routing.row.size)
        gather = Moved("gather", 4.0 * rows * self.shape.width)
        swiglu = Moved("SwiGLU", 6.0 * rows * self.shape.hidden)
        steps = {"grouped": [gather, swiglu], "gather": [swiglu], "async": [swiglu]}
        return steps.get(rung.name, [])

    def rungs(self) -> dict[str, Step]:
        """Every rung that the device can run."""
        return {rung.name: self.step(rung) for rung in possible(self.device.arch)}


class Kept(NamedTuple):
    """The gain of a backward pass that does not need the second product's output y."""

    speedup: Range | None
    """Of forward with backward. None: no time is known."""
    gigabytes: float
    """Kept for the backward pass, without y: x and z."""
    gigabytes_with_y: float
    """The same with y."""


def without_y(shape: Shape, train: Step | None, device: Device) -> Kept:
    """Forward and backward (`train`) without y over the same with y kept, and the bytes kept.

    A layer that keeps y reads it, and d_out's rows once more: rows of D numbers of two bytes each.
    """
    rows = shape.tokens * shape.per_token
    kept = 2.0 * (shape.tokens * shape.width + 2 * rows * shape.hidden)
    with_y = kept + 2.0 * rows * shape.width
    speedup = None
    if train:
        extra = other_seconds(4.0 * rows * shape.width, 0, device)
        speedup = Range(1 + extra / train.seconds.high, 1 + extra / train.seconds.low)
    return Kept(speedup, kept / 1e9, with_y / 1e9)
