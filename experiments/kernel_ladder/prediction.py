"""The rungs without a GPU: compiled for one that is not there, and timed by launch_model.

Everything here is a prediction.
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from moe_kernels.launch import Launch, recording
from moe_kernels.schedule.api import schedule_shape

from experiments.kernel_ladder.cases import DTYPE, Shape, Step, layer_arrays, make_routing
from experiments.kernel_ladder.launch_model import Device, Product, launch_seconds, other_seconds
from experiments.kernel_ladder.rungs import Rung, built, possible
from moe_jax.moe.xla import batch_share


class LaunchTime(NamedTuple):
    """One launch, as predicted."""

    seconds: float
    dram_bytes: float
    note: str
    """What ptxas reports of it. Empty where it is no product."""


class Prediction:
    """Predicts the rungs of one shape on one device.

    Launches that rungs share are compiled once.
    """

    def __init__(self, shape: Shape, device: Device, seed: int) -> None:
        self.shape = shape
        self.device = device
        plan = make_routing(shape, seed)
        self.counts = np.asarray(plan.counts)
        self.block_rows = plan.block_rows
        assignment = np.asarray(plan.assignment).reshape(-1, plan.block_rows)
        # Rows that fill up an expert's last block have the number of rows as their assignment.
        real = assignment < plan.row.size
        # Which row of its input a product's row reads, -1 for none: the gathered first product
        # reads the token's, every other product its own.
        self.token = np.where(real, assignment // shape.per_token, -1)
        self.row = np.where(real, np.arange(assignment.size).reshape(assignment.shape), -1)
        self._known: dict[str, LaunchTime] = {}

    def step(self, rung: Rung) -> Step:
        """The sum over what the rung launches."""
        if rung.change is None:
            return self.of_xla()
        launches = [self.time_launch(launch) for launch in self.launches(rung)]
        between = self.between(rung)
        seconds = sum(launch.seconds for launch in launches)
        seconds += sum(other_seconds(moved, 0, self.device) for moved in between)
        moved = sum(launch.dram_bytes for launch in launches) + sum(between)
        notes = [launch.note for launch in launches if launch.note]
        return Step(1e3 * seconds, moved / 1e9, "; ".join(notes))

    def of_xla(self) -> Step:
        """xla.mixture with balanced experts, as the plain GEMM's rate and memory allow.

        Its steps: gather, first product, SwiGLU, second product, sum over the experts of a token.
        """
        shape = self.shape
        width = shape.width
        hidden = shape.hidden
        assignments = shape.tokens * shape.per_token
        rows = shape.experts * batch_share(assignments, shape.experts, shape.tokens)
        matrix = shape.experts * width * hidden
        steps = [  # (numbers moved, FLOPs)
            (2 * rows * width, 0),
            (rows * (width + 2 * hidden) + 2 * matrix, 4 * rows * width * hidden),
            (3 * rows * hidden, 0),
            (rows * (hidden + width) + matrix, 2 * rows * width * hidden),
            ((assignments + shape.tokens) * width, 0),
        ]
        # A number is two bytes.
        seconds = sum(other_seconds(2 * numbers, flops, self.device) for numbers, flops in steps)
        moved = 2 * sum(numbers for numbers, _ in steps)
        return Step(1e3 * seconds, moved / 1e9, "as cuBLAS at the plain GEMM's rate")

    def launches(self, rung: Rung) -> list[Launch]:
        """What the rung's program launches on this device."""
        s = self.shape
        plan = schedule_shape(s.tokens, s.per_token, s.experts, self.block_rows)
        with recording(self.device.arch) as found, built(rung, DTYPE, self.block_rows):
            jax.eval_shape(lambda *a: rung.layer(*a), *layer_arrays(s), plan)
        return found

    def between(self, rung: Rung) -> list[float]:
        """Bytes of XLA's own steps between the launches, two for each number."""
        rows = float(self.row.size)
        gather = 4.0 * rows * self.shape.width
        swiglu = 6.0 * rows * self.shape.hidden
        steps = {"grouped": [gather, swiglu], "gather": [swiglu], "async": [swiglu]}
        return steps.get(rung.name, [])

    def time_launch(self, launch: Launch) -> LaunchTime:
        """A product by launch_model, everything else as fast as memory allows."""
        # The audit imports Triton's compiler: only a prediction needs it.
        from moe_kernels.audit import describe

        constants = launch.constants
        name = launch.kernel.__name__
        if name == "combine_kernel":
            rows = self.shape.tokens * (self.shape.per_token + 1)
            return self.of_memory(2.0 * rows * constants["D"])
        if name.startswith("quantise"):
            arrays = (*launch.inputs, *launch.outputs)
            return self.of_memory(float(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)))
        depth = constants.get("KD", constants.get("D"))
        key = f"{describe(launch)} {constants['GROUP']} {depth}"
        if key not in self._known:
            self._known[key] = self.of_product(launch)
        return self._known[key]

    def of_memory(self, moved: float) -> LaunchTime:
        """A launch that only moves bytes."""
        return LaunchTime(other_seconds(moved, 0, self.device), moved, "")

    def of_product(self, launch: Launch) -> LaunchTime:
        """A grouped product, compiled for the device."""
        from moe_kernels.audit import LIMITS, compile_launch

        c = launch.constants
        name = launch.kernel.__name__
        row = compile_launch(launch, self.device.arch)
        warps = launch.tuning.warps
        resident = max(1, round(row["occupancy"] * LIMITS[self.device.arch].warps / warps))
        up = "up" in name
        fp8 = name.startswith("fp8")
        product = Product(
            depth=c["D"] if up else c["KD"],
            columns=c["F"] if up else c["N"],
            halves=2 if up else 1,
            bm=c["BM"],
            bn=c["BN"],
            bk=c["BK"],
            # Without cp.async in the machine code nothing is in flight, whatever was asked for.
            stages=launch.tuning.stages if row["cp_async"] else 1,
            group=c["GROUP"],
            resident=min(resident, 1) if "persistent" in row["config"] else resident,
            special=row["special"],
            threads=32 * warps,
            stored=1,
            gathered=up or c.get("GATHER", False),
            itemsize=1 if fp8 else 2,
            rate=2.0 if fp8 else 1.0,
            promoted=fp8,
        )
        source = (self.token if product.gathered else self.row).reshape(-1, product.bm)
        seconds, moved = launch_seconds(self.counts, source, product, self.device)
        note = f"{row['kernel']} {row['registers']} registers, {product.resident} resident"
        note += f", {row['cp_async']} cp.async, {row['special']} special"
        if row["spill_bytes"]:
            note += f", {row['spill_bytes']} bytes SPILLED"
        return LaunchTime(seconds, moved, note)


def predict(shape: Shape, device: Device, seed: int) -> dict[str, Step]:
    """Every rung, without a GPU."""
    prediction = Prediction(shape, device, seed)
    return {rung.name: prediction.step(rung) for rung in possible(device.arch)}


class Backward(NamedTuple):
    """The gain of a backward pass that does not need the second product's output y."""

    speedup: float
    """Of forward with backward."""
    kept_gigabytes: float
    """Kept for the backward pass, without y: x and z."""
    kept_with_y: float
    """The same with y, in GB."""


def backward(shape: Shape, forward: Step, device: Device) -> Backward:
    """Predicted: forward and backward at the forward pass's rate, with and without reading y.

    A layer that keeps y reads it, and d_out's rows once more: rows of D numbers of two bytes each.
    """
    rows = shape.tokens * shape.per_token
    kept = 2.0 * (shape.tokens * shape.width + 2 * rows * shape.hidden)
    # Backward has twice the products of forward, so both together take three times as long.
    own = 3e-3 * forward.milliseconds
    extra = other_seconds(4.0 * rows * shape.width, 0, device)
    with_y = kept + 2.0 * rows * shape.width
    return Backward((own + extra) / own, kept / 1e9, with_y / 1e9)
