"""The rungs of lever_kernels without a GPU: compiled for one that is not there, and timed by
kernel_model. Everything here is a prediction."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from moe_kernels.launch import Launch, recording
from moe_kernels.schedule.api import schedule_shape

from experiments.kernel_ladder.launch_model import Device, Product, launch_seconds, other_seconds
from experiments.kernel_ladder.rungs import Rung, built, possible
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.xla import batch_share

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T, D, F, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int

    @property
    def flops(self) -> float:
        """Useful ones, forward."""
        return 6.0 * self.tokens * self.per_token * self.width * self.hidden


@dataclass(frozen=True)
class Step:
    """One rung on one shape."""

    milliseconds: float
    dram_gigabytes: float | None
    note: str
    """What ptxas made of the products."""


def arrays(shape: Shape) -> tuple[Any, ...]:
    """x, weights, gate_up and down as shapes."""
    t, d, f, e, k = shape.tokens, shape.width, shape.hidden, shape.experts, shape.per_token
    return (
        ShapeDtypeStruct((t, d), DTYPE),
        ShapeDtypeStruct((t, k), jnp.float32),
        ShapeDtypeStruct((e, d, 2 * f), DTYPE),
        ShapeDtypeStruct((e, f, d), DTYPE),
    )


def routing(shape: Shape, seed: int) -> Plan:
    """Of independent tokens whose gate prefers no expert."""
    random = np.random.default_rng(seed)
    scores = random.random((shape.tokens, shape.experts))
    chosen = np.argpartition(scores, shape.per_token, axis=1)[:, : shape.per_token]
    return make_plan(jnp.asarray(chosen, jnp.int32), shape.experts)


class Prediction:
    """Predicted rungs of one shape on one device; launches that rungs share are compiled once."""

    def __init__(self, shape: Shape, device: Device, seed: int) -> None:
        self.shape, self.device = shape, device
        plan = routing(shape, seed)
        self.counts = np.asarray(plan.counts)
        self.block_rows = plan.block_rows
        assignment = np.asarray(plan.assignment).reshape(-1, plan.block_rows)
        real = assignment < plan.row.size
        self.token = np.where(real, assignment // shape.per_token, -1)
        self.row = np.where(real, np.arange(assignment.size).reshape(assignment.shape), -1)
        self.known: dict[str, tuple[float, float, str]] = {}

    def step(self, rung: Rung) -> Step:
        """The sum over what the rung launches."""
        if rung.change is None:
            return self.of_xla()
        seconds, moved, notes = 0.0, 0.0, []
        for launch in self.launches(rung):
            took, bytes_moved, note = self.launch(launch, rung)
            seconds, moved = seconds + took, moved + bytes_moved
            notes += [note] if note else []
        for bytes_moved in self.between(rung):
            seconds += other_seconds(bytes_moved, 0, self.device)
            moved += bytes_moved
        return Step(1e3 * seconds, moved / 1e9, "; ".join(notes))

    def of_xla(self) -> Step:
        """xla.mixture with balanced experts: gather, product, SwiGLU, product, sum, each as fast as
        the plain GEMM or memory allows."""
        s, d, f = self.shape, self.shape.width, self.shape.hidden
        rows = s.experts * batch_share(s.tokens * s.per_token, s.experts, s.tokens)
        matrices = 3 * s.experts * d * f
        numbers = [2 * rows * d, rows * (d + 2 * f), 3 * rows * f, rows * (f + d)]
        numbers.append((s.tokens * s.per_token + s.tokens) * d)
        numbers[1] += 2 * matrices // 3
        numbers[3] += matrices // 3
        flops = [0, 4 * rows * d * f, 0, 2 * rows * d * f, 0]
        parts = [other_seconds(2 * n, w, self.device) for n, w in zip(numbers, flops, strict=True)]
        return Step(1e3 * sum(parts), 2 * sum(numbers) / 1e9, "as cuBLAS at the plain GEMM's rate")

    def launches(self, rung: Rung) -> list[Launch]:
        """What the rung's program launches on this device."""
        s = self.shape
        plan = schedule_shape(s.tokens, s.per_token, s.experts, self.block_rows)
        with recording(self.device.arch) as found, built(rung, DTYPE, self.block_rows):
            jax.eval_shape(lambda *a: rung.layer(*a), *arrays(s), plan)
        return found

    def between(self, rung: Rung) -> list[float]:
        """Bytes of XLA's own steps between the launches."""
        rows, s = float(self.row.size), self.shape
        gather, swiglu = 4.0 * rows * s.width, 6.0 * rows * s.hidden
        return {"grouped": [gather, swiglu], "gather": [swiglu], "async": [swiglu]}.get(
            rung.name, []
        )

    def launch(self, launch: Launch, rung: Rung) -> tuple[float, float, str]:
        """(seconds, bytes from and to DRAM, what ptxas made of it)."""
        from moe_kernels.audit import WARPS, compile_launch, describe

        c = launch.constants
        name = launch.kernel.__name__
        if name == "combine_kernel":
            moved = 2.0 * (self.shape.tokens * (self.shape.per_token + 1)) * c["D"]
            return other_seconds(moved, 0, self.device), moved, ""
        if name.startswith("quantise"):
            given = (*launch.inputs, *launch.outputs)
            moved = float(sum(math.prod(a.shape) * a.dtype.itemsize for a in given))
            return other_seconds(moved, 0, self.device), moved, ""
        key = f"{describe(launch)} {c['GROUP']} {c.get('KD', c.get('D'))}"
        if key not in self.known:
            row = compile_launch(launch, self.device.arch)
            warps = launch.tuning.warps
            resident = max(1, round(row["occupancy"] * WARPS[self.device.arch] / warps))
            up, fp8 = "up" in name, name.startswith("fp8")
            product = Product(
                depth=c["D"] if up else c["KD"],
                columns=c["F"] if up else c["N"],
                halves=2 if up else 1,
                bm=c["BM"],
                bn=c["BN"],
                bk=c["BK"],
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
            self.known[key] = seconds, moved, note
        return self.known[key]


def predict(shape: Shape, device: Device, seed: int) -> dict[str, Step]:
    """Every rung, without a GPU."""
    prediction = Prediction(shape, device, seed)
    return {rung.name: prediction.step(rung) for rung in possible(device.arch)}


class Backward(NamedTuple):
    """What it buys not to keep the second product's output y."""

    speedup: float
    """Of forward with backward."""
    kept_gigabytes: float
    """Kept for the backward pass, without y: x and z."""
    kept_with_y: float


def backward(shape: Shape, forward: Step, device: Device) -> Backward:
    """Predicted: forward and backward at the forward pass's rate, against the same and a read of y
    and of d_out's rows."""
    rows = shape.tokens * shape.per_token
    kept = 2.0 * (shape.tokens * shape.width + 2 * rows * shape.hidden)
    own = 3e-3 * forward.milliseconds
    extra = other_seconds(4.0 * rows * shape.width, 0, device)
    with_y = kept + 2.0 * rows * shape.width
    return Backward((own + extra) / own, kept / 1e9, with_y / 1e9)
