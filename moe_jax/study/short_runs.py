"""Short runs of the training command, each in a process of its own, to compare their updates."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.base.console import track
from moe_jax.base.machine import gemm_rate
from moe_jax.config import TrainConfig
from moe_jax.model.dtype import compute_dtype
from moe_jax.study.rounds import speedup
from moe_jax.train.metrics import read_lines


class Variant(NamedTuple):
    """A way to start the training command."""

    tunables: str
    """glibc's allocator settings (GLIBC_TUNABLES)."""
    options: list[str]
    """Further options of the command."""


class ShortRun(NamedTuple):
    """What a short run took."""

    first: float
    """Seconds from its start to the first update."""
    update: float
    """Median seconds of an update."""
    resident: float
    """Peak resident bytes."""


def short_run(script: Path, config: TrainConfig, variant: Variant, steps: int = 40) -> ShortRun:
    """Starts `script PRESET` for a few steps and waits for its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), config.preset, "--out", folder]
        command += ["--steps", str(steps), "--evaluate-every", "100000", "--samples", "0"]
        command += variant.options
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**os.environ, "GLIBC_TUNABLES": variant.tunables},
            stdout=subprocess.DEVNULL,
        )
        metrics = Path(folder) / "metrics.jsonl"
        try:
            while not any(read_lines(metrics)):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
                time.sleep(0.02)
            first = time.perf_counter() - start
            # wait4 and not process.wait(): this child's peak memory, not that of all children.
            _, _, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:  # the folder is removed, so the run must not go on in it
            process.kill()
            raise
        seconds = [line["seconds"] for line in read_lines(metrics) if "seconds" in line]
        # ru_maxrss is in bytes on macOS and in KiB elsewhere.
        resident = usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
        return ShortRun(first, float(np.median(seconds)), resident)


def paired_runs(
    script: Path, config: TrainConfig, variants: Mapping[str, Variant], rounds: int
) -> tuple[dict[str, list[ShortRun]], list[float]]:
    """(every variant once a round, the plain GEMM's FLOP/s before, between and after the runs).

    The best of these is the limit. One that was taken while something else ran would be too low.
    """
    runs: dict[str, list[ShortRun]] = {name: [] for name in variants}
    rates = []
    for _ in track(range(rounds), f"short runs of {script.name}"):
        for name, variant in variants.items():
            rates.append(gemm_rate(compute_dtype(config.model).name))
            runs[name].append(short_run(script, config, variant))
    rates.append(gemm_rate(config.model.compute_dtype))
    return runs, rates


def update_speedup(runs: list[ShortRun], baseline: list[ShortRun]) -> float:
    """How many times as fast an update is, the median over rounds."""
    return speedup([run.update for run in runs], [run.update for run in baseline])
