"""The kernels beside their peers and the device's own GEMM, on real sizes. Needs a GPU.

    python kernels/bench.py [--json FILE] [--plot FILE] [--shapes NAME ...] [--decode] [--tune]

For every shape: one grouped GEMM, the whole layer forward, and forward with backward, through the
kernels, XLA's path, lax.ragged_dot, and tokamax's ragged_dot and torch's grouped_mm where they are
installed; TFLOP/s of useful work, as a fraction of a large bf16 GEMM of the same round, and the
bytes that the compiled program allocates. --decode: few tokens, microseconds. --tune: the table's
candidates for every operation, best first, to be written into moe_kernels/experts/shapes.py.
The routing is random and nearly balanced; the time of the plan is part of the layer's.
"""

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from moe_kernels.experts import grouped, mixture
from moe_kernels.experts.shapes import OPERATIONS, Tiles, tiles, using
from moe_kernels.launch import Tuning, triton_support
from moe_kernels.timing import device_report, paired, ratio

from moe_jax.moe import xla
from moe_jax.moe.plan import make_plan


class Shape(NamedTuple):
    """Sizes of one layer."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int

    @property
    def flops(self) -> float:
        """Forward, 6 T K D F, without the router."""
        return 6.0 * self.tokens * self.per_token * self.width * self.hidden


SONIC = {
    f"sonic {name} n={hidden}": Shape(tokens, width, hidden, experts, per_token)
    for name, tokens, width, first, most in (
        ("1.4B", 40960, 768, 256, (128, 8)),
        ("7B", 24576, 1536, 256, (128, 8)),
        ("30B", 32768, 4096, 256, (256, 16)),
        ("120B", 32768, 4096, 512, (256, 16)),
    )
    for hidden, experts, per_token in (
        (first << step, most[0] >> step, most[1] >> step) for step in range(3)
    )
}
"""SonicMoE's grid (arXiv:2512.14080): the same work in ever fewer and larger experts."""
MODELS = {
    "OLMoE-1B-7B": Shape(8192, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(8192, 2048, 768, 128, 8),
    "DeepSeek-V2-Lite": Shape(8192, 2048, 1408, 64, 6),
    "Qwen1.5-MoE": Shape(8192, 2048, 1408, 60, 4),
    "gpt-oss-120b": Shape(8192, 2880, 2880, 128, 4),
    "Mixtral-8x7B": Shape(8192, 4096, 14336, 8, 2),
    "DeepSeek-V3": Shape(8192, 7168, 2048, 256, 8),
}
SHAPES = SONIC | MODELS
DECODING = (1, 2, 4, 8, 16, 64)
GEMM = 8192


class Inputs(NamedTuple):
    """Arrays of a layer in one dtype."""

    x: Array
    weights: Array
    gate_up: Array
    down: Array
    experts: Array
    d_out: Array


def make_inputs(shape: Shape, dtype: str, seed: int = 0) -> Inputs:
    """Made on the device: the largest is gigabytes."""
    keys = jax.random.split(jax.random.key(seed), 6)
    t, d, f, e, k = shape
    experts = jax.lax.top_k(jax.random.normal(keys[4], (t, e)), k)[1]
    return Inputs(
        jax.random.normal(keys[0], (t, d), dtype),
        jax.random.uniform(keys[1], (t, k)),
        jax.random.normal(keys[2], (e, d, 2 * f), dtype) / d**0.5,
        jax.random.normal(keys[3], (e, f, d), dtype) / f**0.5,
        experts.astype(jnp.int32),
        jax.random.normal(keys[5], (t, d), dtype),
    )


def ragged(
    x: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    plan: Any,
    dot: Callable[..., Array] = jax.lax.ragged_dot,
) -> Array:
    """The layer by sort and ragged_dot: JAX's own answer, or another library's."""
    flat = plan.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = x[order // weights.shape[1]]
    gate, up = jnp.split(dot(rows, gate_up, plan.counts), 2, axis=1)
    y = dot(jax.nn.silu(gate) * up, down, plan.counts)
    back = y[jnp.argsort(order)].reshape(*weights.shape, -1)
    return jnp.einsum("tk,tkd->td", weights, back.astype(jnp.float32)).astype(x.dtype)


LAYERS: dict[str, Callable[..., Array]] = {
    "triton": mixture,
    "xla": xla.mixture,
    "ragged_dot": ragged,
}
if importlib.util.find_spec("tokamax"):
    import tokamax  # pyright: ignore[reportMissingImports]

    LAYERS["tokamax"] = partial(ragged, dot=tokamax.ragged_dot)


def layer_calls(inputs: Inputs, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward, of each JAX implementation that compiles and fits."""
    calls = {}
    *arrays, experts, d_out = inputs

    def forward(layer: Callable[..., Array], experts: Array, *arrays: Array) -> Array:
        return layer(*arrays, make_plan(experts, len(arrays[-1])))

    def train(layer: Callable[..., Array], experts: Array, d_out: Array, *arrays: Array) -> Any:
        out, pull = jax.vjp(partial(forward, layer, experts), *arrays)
        return out, pull(d_out)

    for name in names:
        programs = {
            "forward": jax.jit(partial(forward, LAYERS[name])).lower(experts, *arrays),
            "train": jax.jit(partial(train, LAYERS[name])).lower(experts, d_out, *arrays),
        }
        given = {"forward": (experts, *arrays), "train": (experts, d_out, *arrays)}
        for kind, program in programs.items():
            call = runnable(program, given[kind], f"{name} {kind}")
            if call:
                calls[f"{name} {kind}"] = call
    return calls


class Program:
    """A compiled call, with the bytes that it allocates."""

    def __init__(self, compiled: Any, arguments: tuple[Array, ...]) -> None:
        self.compiled, self.arguments = compiled, arguments
        memory = compiled.memory_analysis()
        self.bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def runnable(program: Any, arguments: tuple[Array, ...], name: str) -> Program | None:
    """The compiled program after one run; None, with the reason in a line, where it has none."""
    try:
        call = Program(program.compile(), arguments)
        jax.block_until_ready(call())
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        print(f"{name}: left out: {str(error).splitlines()[0][:150]}", flush=True)
        return None
    return call


def torch_calls(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """torch._grouped_mm on rows in expert order: one product of the up-projection's size."""
    try:
        import torch
    except ImportError:
        return {}
    product = getattr(torch, "_grouped_mm", None)
    if product is None or not torch.cuda.is_available():
        return {}
    counts = np.bincount(np.asarray(inputs.experts).ravel(), minlength=len(inputs.down))
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device="cuda")
    rows = torch.randn(inputs.experts.size, inputs.x.shape[1], dtype=torch.bfloat16, device="cuda")
    matrix = torch.randn(inputs.gate_up.shape, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        product(rows, matrix, ends)
        torch.cuda.synchronize()

    return {"torch grouped_mm": call}


def gemm_calls(inputs: Inputs, size: int) -> dict[str, Callable[[], Any]]:
    """The limit, and single grouped products [R, D] x [E, D, 2F]."""
    square = jnp.ones((size, size), inputs.x.dtype)
    plan = jax.jit(partial(make_plan, num_experts=len(inputs.down)))(inputs.experts)
    gathered = jax.jit(partial(grouped, gathered=True))
    return {
        "plain gemm": partial(jax.jit(jnp.matmul), square, square),
        "grouped gemm": partial(gathered, inputs.x, inputs.gate_up, plan),
    } | torch_calls(inputs)


def bench(name: str, shape: Shape, dtype: str, rounds: int, size: int = GEMM) -> dict[str, Any]:
    """A row of the table: TFLOP/s, fraction of the plain GEMM, bytes."""
    inputs = make_inputs(shape, dtype)
    calls = gemm_calls(inputs, size) | layer_calls(inputs, list(LAYERS))
    seconds = paired(calls, rounds)
    flops = {"plain gemm": 2.0 * size**3, "grouped gemm": shape.flops * 2 / 3}
    flops["torch grouped_mm"] = flops["grouped gemm"]
    row: dict[str, Any] = {"name": name, "dtype": dtype, **shape._asdict(), "calls": {}}
    plain = np.asarray(seconds["plain gemm"])
    for call, times in seconds.items():
        work = flops.get(call, shape.flops * (3 if call.endswith("train") else 1))
        of_gemm = ratio(times, list(plain * work / flops["plain gemm"]))
        row["calls"][call] = {
            "milliseconds": 1e3 * float(np.median(times)),
            "teraflops": work / float(np.median(times)) / 1e12,
            "of_gemm": of_gemm,
            "bytes": getattr(calls[call], "bytes", None),
        }
        if call.endswith("train") and f"{call[:-5]}forward" in seconds:
            alone = np.asarray(times) - np.asarray(seconds[f"{call[:-5]}forward"])
            row["calls"][f"{call[:-5]}backward"] = {
                "milliseconds": 1e3 * float(np.median(alone)),
                "teraflops": 2 * shape.flops / float(np.median(alone)) / 1e12,
                "of_gemm": ratio(list(alone), list(plain * 2 * shape.flops / flops["plain gemm"])),
                "bytes": None,
            }
    return row


def bench_decode(name: str, shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """Microseconds of few tokens, beside the time to read the used experts at the rate at which
    the same device copies."""
    calls: dict[str, Callable[[], Any]] = {}
    used = {}
    for tokens in DECODING:
        inputs = make_inputs(shape._replace(tokens=tokens), dtype)
        used[tokens] = len(np.unique(np.asarray(inputs.experts)))
        for call, run in layer_calls(inputs, ["triton", "xla"]).items():
            if call.endswith("forward"):
                calls[f"{call} T={tokens}"] = run
    calls["copy"] = partial(jax.jit(jnp.negative), jnp.ones(1 << 28, jnp.int8))
    seconds = {call: float(np.median(times)) for call, times in paired(calls, rounds).items()}
    rate = 2 * (1 << 28) / seconds.pop("copy")
    bytes_expert = 3 * shape.width * shape.hidden * jnp.dtype(dtype).itemsize
    rows = {
        call: {
            "microseconds": 1e6 * value,
            "of_reading": used[int(call.split("=")[1])] * bytes_expert / rate / value,
        }
        for call, value in seconds.items()
    }
    return {"name": name, "dtype": dtype, "decoding": rows, "copy_bytes_per_second": rate}


def candidates(operation: str) -> list[Tiles]:
    """Tiles worth trying for 16-bit numbers."""
    columns = (64, 128) if operation != "rows" else (64, 128, 256)
    found = itertools.product(columns, (32, 64, 128), (4, 8), (3, 4), (0, 1))
    return [Tiles(n, k, Tuning(w, s), resident=p) for n, k, w, s, p in found]


def tune(name: str, shape: Shape, dtype: str, rounds: int, most: int | None) -> dict[str, Any]:
    """The fastest tiles of each operation, one operation changed at a time."""
    inputs = make_inputs(shape, dtype)
    plan = make_plan(inputs.experts, shape.experts)
    best = {}
    for operation in OPERATIONS:
        calls = {}
        for entry in [tiles(operation, jnp.dtype(dtype), plan.block_rows), *candidates(operation)]:
            with using({operation: entry}):
                kind = "train" if operation == "hidden gradient" else "forward"
                found = layer_calls(inputs, ["triton"]).get(f"triton {kind}")
            if found:
                calls[str(entry)] = found
            if most and len(calls) >= most:
                break
        seconds = paired(calls, rounds)
        order = sorted(calls, key=lambda call: float(np.median(seconds[call])))
        best[operation] = {call: 1e3 * float(np.median(seconds[call])) for call in order[:5]}
        print(f"{name} {operation}: {order[0]}", flush=True)
    return {"name": name, "dtype": dtype, "block_rows": plan.block_rows, "tuned_ms": best}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Fractions of the plain GEMM: grouped GEMM, forward and backward of every implementation."""
    from matplotlib.figure import Figure

    kinds = ("grouped gemm", "triton forward", "triton backward", "xla forward", "xla backward")
    figure = Figure(figsize=(10, 1.5 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, kind in enumerate(kinds):
        values = [row["calls"].get(kind, {}).get("of_gemm", 0.0) for row in rows]
        at = np.arange(len(rows)) + 0.16 * (index - 2)
        axes.barh(at, values, 0.15, label=kind)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.5", linestyle="--")
    axes.set_xlabel(f"useful FLOP/s over those of a {GEMM}^3 GEMM in the same rounds")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def show(row: dict[str, Any]) -> None:
    """A row, as it is measured."""
    print(f"\n{row['name']} {row['dtype']}")
    for call, values in (row.get("calls") or row.get("decoding") or {}).items():
        cells = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        print(f"  {call:24} {cells}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Measures, prints, writes after every row."""
    parser = argparse.ArgumentParser(description="The kernels beside their peers, on a GPU.")
    parser.add_argument("--json", type=Path, default=Path("kernels/results/bench.json"))
    parser.add_argument("--plot", type=Path, help="PNG of the fractions")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode", action="store_true", help="few tokens instead of many")
    parser.add_argument("--tune", action="store_true", help="tiles instead of peers")
    options = parser.parse_args(argv)
    route = triton_support()
    if route.name != "gpu":
        print(f"kernels/bench.py needs an NVIDIA GPU: {route.reason}", file=sys.stderr)
        return 2
    content: dict[str, Any] = {"environment": device_report(), "rows": []}
    run = partial(bench_decode if options.decode else bench, rounds=options.rounds)
    if options.tune:
        run = partial(tune, rounds=3, most=None)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in options.shapes:
        row = run(name, SHAPES[name], options.dtype)
        show(row)
        content["rows"].append(row)
        unfinished = options.json.with_suffix(".partial")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(options.json)
    if options.plot and not options.decode and not options.tune:
        draw(content["rows"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
