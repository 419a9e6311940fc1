"""Rows of the benchmark: large batches against a plain GEMM, and decoding against reading."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_kernels.bench.peers import RAGGED, Peers
from moe_kernels.bench.programs import gemm_calls, layer_calls
from moe_kernels.bench.shapes import Shape, make_inputs
from moe_kernels.timing import paired, ratio

DECODING = (1, 2, 4, 8, 16, 64)
"""Tokens of a decoding step."""
GEMM = 8192
"""Rows, columns and depth of the plain GEMM, large enough for a device's highest rate."""
COPIED_BYTES = 1 << 28
"""Bytes that are copied to measure the rate of memory."""


def measure_layers(
    name: str, shape: Shape, dtype: str, peers: Peers, *, rounds: int, size: int = GEMM
) -> dict[str, Any]:
    """A row: milliseconds, TFLOP/s, the fraction of the plain GEMM's rate, and allocated bytes."""
    inputs = make_inputs(shape, dtype)
    calls = gemm_calls(inputs, peers, size) | layer_calls(inputs, peers, list(peers.layers))
    seconds = paired(calls, rounds)
    gemm_flops = 2.0 * size**3
    gemm = np.asarray(seconds["plain gemm"])

    def entry(times: Sequence[float], flops: float, allocated: int | None) -> dict[str, Any]:
        median = float(np.median(times))
        return {
            "milliseconds": 1e3 * median,
            "teraflops": flops / median / 1e12,
            # Round by round: the time that the same work would take at the plain GEMM's rate.
            "of_gemm": ratio(times, list(gemm * flops / gemm_flops)),
            "bytes": allocated,
        }

    # The up projection is two of the layer's three products.
    flops = {"plain gemm": gemm_flops, "grouped gemm": shape.flops * 2 / 3}
    flops["torch grouped_mm"] = flops["grouped gemm"]
    entries: dict[str, Any] = {}
    for call, times in seconds.items():
        layer, _, kind = call.rpartition(" ")
        # A backward pass has twice the FLOPs of a forward pass.
        work = flops.get(call, shape.flops * (3 if kind == "train" else 1))
        entries[call] = entry(times, work, getattr(calls[call], "bytes", None))
        if kind == "train" and f"{layer} forward" in seconds:
            backward = np.asarray(times) - np.asarray(seconds[f"{layer} forward"])
            entries[f"{layer} backward"] = entry(list(backward), 2 * shape.flops, None)
    return {"name": name, "dtype": dtype, **shape._asdict(), "calls": entries}


def measure_decoding(
    name: str, shape: Shape, dtype: str, peers: Peers, *, rounds: int
) -> dict[str, Any]:
    """A row: microseconds of few tokens, and the fraction of the time that reading takes.

    Reading is of the experts that are used, at the rate at which the same device copies. Layers by
    ragged_dot are left out: they compute every expert.
    """
    calls: dict[str, Callable[[], Any]] = {}
    used = {}
    names = [layer for layer in peers.layers if layer not in RAGGED]
    for tokens in DECODING:
        inputs = make_inputs(shape._replace(tokens=tokens), dtype)
        used[tokens] = len(np.unique(np.asarray(inputs.experts)))
        for call, run in layer_calls(inputs, peers, names).items():
            if call.endswith("forward"):
                calls[f"{call} T={tokens}"] = run
    # A negation reads and writes every byte once.
    calls["copy"] = partial(jax.jit(jnp.negative), jnp.ones(COPIED_BYTES, jnp.int8))
    seconds = {call: float(np.median(times)) for call, times in paired(calls, rounds).items()}
    rate = 2 * COPIED_BYTES / seconds.pop("copy")
    bytes_per_expert = 3 * shape.width * shape.hidden * jnp.dtype(dtype).itemsize
    entries = {
        call: {
            "microseconds": 1e6 * value,
            "of_reading": used[int(call.split("=")[1])] * bytes_per_expert / rate / value,
        }
        for call, value in seconds.items()
    }
    return {"name": name, "dtype": dtype, "decoding": entries, "copy_bytes_per_second": rate}
