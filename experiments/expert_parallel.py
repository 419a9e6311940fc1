"""How much of expert parallelism's communication lies under computation on 8 H100, and on 2 x 8?

    python experiments/expert_parallel.py [--out DIR] [--chunks N] [--quick]

No GPU is used, and every time is predicted. XLA compiles the layer for absent H100s, Triton kernels
included. Its scheduled program is then read and priced (moe_jax/predict/scheduled_hlo.py has the
model). It needs the packages triton, jax-triton, jax-cuda13-plugin and jax-cuda13-pjrt.

The load of devices, with and without replicas of hot experts, is counted in training runs on
simulated devices (experiments/rebalancing.py).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Triton's interpreter compiles nothing, and JAX would look for a GPU.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_kernels.experts import Source, mixture
from moe_kernels.launch import lowering_for, missing_package

from experiments import rebalancing
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.config.exchange import ExchangeConfig
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.lanes import Matrices
from moe_jax.predict.absent import OPTIONS, h100s, missing
from moe_jax.predict.scheduled_hlo import Rates, Timeline, covered_by_products, timeline
from moe_jax.study.results import publish

QUESTION = "How much of expert parallelism's communication lies under computation?"
NODE = 8
"""H100s of a machine."""
LATER = ("two_process_chunked_over_plain",)
"""Measurements that this experiment does not make yet. They have no value."""


@dataclass(frozen=True)
class Settings:
    """Compiles DeepSeek-V3's layer for absent H100s, and reads what lies under what."""

    out: str = "runs/expert_parallel"
    """Folder for result.json."""
    seed: int = 0
    """Seed of the training runs in which loads are counted."""
    chunks: int = 16
    """Parts of a device's experts in the chunked layer."""
    width: int = 7168
    """Model width (D)."""
    hidden: int = 2048
    """Expert hidden width (F)."""
    experts: int = 256
    """Experts (E)."""
    per_token: int = 8
    """Experts of a token (K)."""
    tokens: int = 4096
    """Tokens of a device."""
    layers: int = 3
    """Layers of the scanned model."""
    quick: bool = False
    """The plain and the chunked layer on 8 devices alone."""

    def __post_init__(self) -> None:
        own = self.experts // NODE
        require(
            own % self.chunks == 0,
            f"chunks={self.chunks} does not divide the {own} experts of a device",
        )


@dataclass(frozen=True)
class Case:
    """One program."""

    exchange: ExchangeConfig
    backward: bool = False
    """Forward and backward pass. The cotangent depends on the output."""
    scanned: bool = False
    """Layers with residuals in a scan, each computed again in the backward pass."""
    nodes: int = 1


def cases(settings: Settings) -> dict[str, Case]:
    """All programs by name."""
    plain = ExchangeConfig()
    chunked = ExchangeConfig(chunks=settings.chunks)
    found = {}
    for name, exchange in (("plain", plain), ("chunked", chunked)):
        found[f"{name}_forward"] = Case(exchange)
        found[f"{name}_backward"] = Case(exchange, backward=True)
        found[f"{name}_scanned_forward"] = Case(exchange, scanned=True)
        found[f"{name}_scanned_backward"] = Case(exchange, backward=True, scanned=True)
    if settings.quick:
        return found
    found["all_gather_forward"] = Case(ExchangeConfig("all_gather"))
    found["ring_forward"] = Case(ExchangeConfig("ring"))
    found["copies_forward"] = Case(ExchangeConfig("copies"))
    found["chunked_fp8_forward"] = Case(ExchangeConfig(chunks=settings.chunks, fp8=True))
    own = settings.experts // (2 * NODE)
    halved = ExchangeConfig(chunks=min(settings.chunks, own))
    nodes = {"plain": plain, "chunked": halved, "copies": ExchangeConfig("copies", node=NODE)}
    found |= {f"{name}_2x8_forward": Case(way, nodes=2) for name, way in nodes.items()}
    return found


def compiled(settings: Settings, case: Case) -> Any:
    """The program of a case, compiled for absent H100s."""
    devices = NODE * case.nodes
    mesh = Mesh(np.array(h100s(case.nodes, NODE)), ("expert",), axis_types=(AxisType.Auto,))
    sharding = Sharding("expert", devices, case.exchange, mixture, True, in_place=True)
    layers = (settings.layers,) if case.scanned else ()
    split = P(*(None for _ in layers), "expert")
    layer = partial(_stack if case.scanned else _layer, sharding)
    function = jax.shard_map(
        layer, mesh=mesh, in_specs=(P("expert"), split, split), out_specs=P("expert")
    )

    # Any: these stand for arrays.
    def array(*shape: int, dtype: Any = jnp.bfloat16, spec: P = split) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = devices * settings.tokens
    d = settings.width
    x = array(rows, d, spec=P("expert"))
    chosen = (*layers, rows, settings.per_token)
    assigned = Assigned(array(*chosen, dtype=jnp.int32), array(*chosen, dtype=jnp.float32))
    e = settings.experts
    f = settings.hidden
    matrices = Matrices(array(*layers, e, d, 2 * f), array(*layers, e, f, d))
    with jax.set_mesh(mesh), lowering_for(90):
        called = jax.jit(partial(_gradient, function) if case.backward else function)
        return called.lower(x, assigned, matrices).compile(compiler_options=dict(OPTIONS))


def _layer(sharding: Sharding, x: Array, assigned: Assigned, matrices: Matrices) -> Array:
    return expert_parallel(x, assigned, Experts(matrices), sharding)[0]


def _stack(sharding: Sharding, x: Array, assigned: Assigned, stack: Matrices) -> Array:
    """Layers with residuals. The kernels read the matrices of the stack, which stay where they lie.

    The scan's own slices of them only receive the gradients.
    """
    own = stack.down.shape[1]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stack)
    whole = jax.lax.stop_gradient(flat)

    @jax.checkpoint
    def body(x: Array, layer: tuple[Array, Assigned, Matrices]) -> tuple[Array, None]:
        index, assigned, matrices = layer
        experts = Experts(matrices, Source(whole.gate_up, whole.down, index * own))
        return x + expert_parallel(x, assigned, experts, sharding)[0], None

    index = jnp.arange(len(stack.down))
    return jax.lax.scan(body, x, (index, assigned, stack))[0]


def _gradient(function: Any, x: Array, assigned: Assigned, matrices: Matrices) -> Any:
    def loss(x: Array, weights: Array, matrices: Matrices) -> Array:
        out = function(x, assigned._replace(weights=weights), matrices).astype(jnp.float32)
        return jnp.sum(out * out) / 2

    return jax.grad(loss, argnums=(0, 1, 2))(x, assigned.weights, matrices)


@dataclass(frozen=True)
class Reading:
    """The prediction for one program."""

    line: Timeline
    covered: float
    """Share of the transfers' time that lies under products."""
    memory: int
    """Temporary bytes of a device."""


def read(settings: Settings, case: Case) -> Reading:
    """Compiles and prices a program."""
    done = compiled(settings, case)
    text = done.as_text()
    memory = done.memory_analysis().temp_size_in_bytes
    return Reading(timeline(text, Rates()), covered_by_products(text, Rates()), memory)


def device_loads(settings: Settings, out: Path) -> list[Measurement]:
    """eplb_load_before and eplb_load_after of a training run that places experts by load."""
    runs = rebalancing.Settings(seed=settings.seed, quick=settings.quick)
    rows, _ = rebalancing.measure(runs, output_folder(str(out / "rebalancing")))
    return [row for row in rows if row.name in ("eplb_load_before", "eplb_load_after")]


def measurements(readings: Mapping[str, Reading]) -> list[Measurement]:
    """The shares of the issue's names, and a table of every program."""
    share = "of the transfers' time, under products, predicted"
    rows = [
        Measurement("covered_plain", readings["plain_forward"].covered, share),
        Measurement("covered_chunked_forward", readings["chunked_forward"].covered, share),
        Measurement("covered_chunked_backward", readings["chunked_backward"].covered, share),
    ]
    for which in ("forward", "backward", "scanned_forward", "scanned_backward"):
        plain = readings[f"plain_{which}"].line.total
        ratio = plain / readings[f"chunked_{which}"].line.total
        name = f"speedup_{which}"
        rows.append(Measurement(name, ratio, "x, predicted", f"plain_{which}", ratio))
    for name, reading in readings.items():
        line = reading.line
        for part in ("total", "products", "rest", "transfers", "stalled"):
            value = 1e3 * getattr(line, part)
            rows.append(Measurement(f"{name}.{part}", value, "ms a device, predicted"))
        rows.append(Measurement(f"{name}.covered", reading.covered, share))
        rows.append(Measurement(f"{name}.temporary", reading.memory, "bytes a device"))
    return rows + [Measurement(name, None, "not measured yet") for name in LATER]


def verdict(values: Mapping[str, float | int | None]) -> str:
    """Shares and times, with what they are."""
    return (
        "Predicted from programs compiled for 8 absent H100, and not measured: "
        f"{values['covered_chunked_forward']:.1%} of the transfers lie under products forward, "
        f"{values['covered_chunked_backward']:.1%} with the backward pass "
        f"({values['covered_plain']:.1%} without chunks). The layers of a scanned model are "
        f"{values['speedup_scanned_forward']:.2f}x as fast forward, "
        f"{values['speedup_scanned_backward']:.2f}x with the backward pass. Counted in a training "
        f"run, the device with the most load has {values['eplb_load_before']:.2f} times the mean, "
        f"and {values['eplb_load_after']:.2f} times with experts placed by load."
    )


def main(argv: list[str]) -> None:
    """Compiles, reads, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    problem = missing() or missing_package()
    require(not problem, f"no compiler for absent GPUs: {problem}")
    out = output_folder(settings.out)
    readings = {}
    for name, case in cases(settings).items():
        readings[name] = read(settings, case)
        line = readings[name].line
        print(
            f"{name:24s} {1e3 * line.total:8.2f} ms predicted, "
            f"{readings[name].covered:6.1%} of {1e3 * line.transfers:.2f} ms covered",
            flush=True,
        )
    rows = measurements(readings) + device_loads(settings, out)
    publish(
        out,
        experiment="expert_parallel",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={},
    )


if __name__ == "__main__":
    program(main)
