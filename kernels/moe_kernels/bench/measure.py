"""Rows of the benchmark: layers and launches against a plain GEMM, decoding against reading."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_kernels.bench.launches import Work, all_work
from moe_kernels.bench.peers import RAGGED, Peers
from moe_kernels.bench.programs import (
    KINDS,
    Call,
    Program,
    gemm_calls,
    layer_calls,
    plain_gemm,
    runnable,
)
from moe_kernels.bench.shapes import Shape, make_inputs
from moe_kernels.timing import paired, ratio

DECODING = (1, 2, 4, 8, 16, 64)
"""Tokens of a decoding step."""
GEMM = 8192
"""Rows, columns and depth of the plain GEMM, large enough for a device's highest rate."""
COPIED_BYTES = 1 << 28
"""Bytes that are copied to measure the rate of memory."""


def measure_layers(
    name: str,
    shape: Shape,
    dtype: str,
    peers: Peers,
    *,
    rounds: int,
    size: int = GEMM,
    forward_only: Sequence[str] = (),
) -> dict[str, Any]:
    """A row: milliseconds, TFLOP/s, the fraction of the plain GEMM's rate, and allocated bytes.

    The layers of `forward_only` have no backward pass in it. Raises RuntimeError where not even the
    plain GEMM runs.
    """
    inputs = make_inputs(shape, dtype)
    calls = gemm_calls(inputs, peers, size)
    for layer in peers.layers:
        kinds = ("forward",) if layer in forward_only else KINDS
        calls |= layer_calls(inputs, peers, [layer], kinds)
    seconds = paired(calls, rounds)
    gemm_flops = 2.0 * size**3
    gemm = plain_gemm_seconds(seconds)

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


def plain_gemm_seconds(seconds: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Seconds of the limit by round. Raises RuntimeError where it did not run."""
    if "plain gemm" not in seconds:
        raise RuntimeError("the plain GEMM, with which all is compared, did not run")
    return np.asarray(seconds["plain gemm"])


def measure_launches(
    name: str, shape: Shape, dtype: str, peers: Peers, *, rounds: int, size: int = GEMM
) -> dict[str, Any]:
    """A row: each launch of a training step by itself, beside the plain GEMM and a plain copy.

    A product has TFLOP/s and the fraction of the GEMM's rate. Another launch has bytes per second
    and the fraction of the copy's rate, both from the least that it has to read and write.
    """
    work = all_work(shape, dtype, peers)
    makers = {
        "plain gemm": partial(plain_gemm, size, dtype),
        "copy": copy_call,
        **{launch: partial(Program, w.function, w.arrays) for launch, w in work.items()},
    }
    calls = {launch: call for launch, make in makers.items() if (call := runnable(launch, make))}
    seconds = paired(calls, rounds)
    gemm = plain_gemm_seconds(seconds) / (2.0 * size**3)
    copy = np.asarray(seconds["copy"]) / (2.0 * COPIED_BYTES) if "copy" in seconds else None
    entries: dict[str, Any] = {}
    for launch, times in seconds.items():
        median = float(np.median(times))
        entry: dict[str, Any] = {"microseconds": 1e6 * median}
        if flops := 2.0 * size**3 if launch == "plain gemm" else _flops(work, launch):
            entry["teraflops"] = flops / median / 1e12
            entry["of_gemm"] = ratio(times, list(gemm * flops))
        elif copy is not None:
            moved = 2.0 * COPIED_BYTES if launch == "copy" else work[launch].bytes
            entry["gigabytes_per_second"] = moved / median / 1e9
            entry["of_copy"] = ratio(times, list(copy * moved))
        entries[launch] = entry
    return {"name": name, "dtype": dtype, **shape._asdict(), "calls": entries}


def _flops(work: Mapping[str, Work], launch: str) -> float:
    return work[launch].flops if launch in work else 0.0


def copy_call() -> Call:
    """A negation, which reads and writes every byte once."""
    return Program(jnp.negative, (jnp.ones(COPIED_BYTES, jnp.int8),))


def measure_decoding(
    name: str,
    shape: Shape,
    dtype: str,
    peers: Peers,
    *,
    rounds: int,
    tokens: Sequence[int] = DECODING,
) -> dict[str, Any]:
    """A row: microseconds of few tokens, and the fraction of the time that reading takes.

    Reading is of the experts that are used, at the rate at which the same device copies. Layers by
    ragged_dot are left out: they compute every expert.
    """
    calls: dict[str, Call] = {}
    used = {}
    names = [layer for layer in peers.layers if layer not in RAGGED]
    for count in tokens:
        inputs = make_inputs(shape._replace(tokens=count), dtype)
        used[count] = len(np.unique(np.asarray(inputs.experts)))
        for call, run in layer_calls(inputs, peers, names, ("forward",)).items():
            calls[f"{call} T={count}"] = run
    calls["copy"] = copy_call()
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
