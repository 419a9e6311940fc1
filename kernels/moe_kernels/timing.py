"""Times of GPU programs: medians of rounds in which every call has its turn."""

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

BATCH_SECONDS = 0.05
"""A call is repeated for about this long between two waits for the device, so that a wait's cost
does not show."""


def paired(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round.

    Whatever slows the device for a while slows all calls of a round, so ratios are to be taken
    within a round. Calls return JAX arrays, or block by themselves.
    """
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_timed(call, repeats[name]))
    return seconds


def ratio(of: Sequence[float], over: Sequence[float]) -> float:
    """Median over the rounds of over / of: how many times as fast `of` is."""
    return statistics.median(b / a for a, b in zip(of, over, strict=True))


def _timed(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(repeats):
        result = call()
    # Programs of one device run in order, so the last result is enough to wait for.
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any]) -> int:
    """Calls in a row that take about BATCH_SECONDS, at most 1000."""
    _timed(call, 2)  # not counted: the first calls compile and allocate
    return max(1, min(1000, round(BATCH_SECONDS / max(1e-6, _timed(call, 1)))))


def device_report() -> dict[str, str]:
    """Device, driver, clocks and versions. Without an NVIDIA driver the device and versions."""
    packages = ("jax", "jaxlib", "jax-triton", "triton", "torch")
    report = {"device": jax.devices()[0].device_kind}
    for package in packages:
        try:
            report[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report[package] = "absent"
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return report
    values = output.splitlines()[0].split(", ")
    return report | dict(zip(query.split(","), values, strict=True))
