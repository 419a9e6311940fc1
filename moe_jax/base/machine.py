"""This machine: versions, devices, memory, disk, and the speed of a plain matrix product."""

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from moe_kernels.launch import triton_support

from moe_jax.base.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """Versions and devices, for result.json."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "backend": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": _cores(),
        "triton": ": ".join(triton_support()),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def _cores() -> int:
    # The affinity counts the cores of a container or a batch job. macOS does not have it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The CPU's name as Linux gives it, elsewhere as Python does."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


class GemmRates(NamedTuple):
    """FLOP/s of a plain GEMM, measured before and after the work that is compared with it."""

    before: float
    after: float

    @property
    def best(self) -> float:
        """The limit. A machine that does other work only makes a measurement lower."""
        return max(self)

    @property
    def moved(self) -> bool:
        """Whether the two differ by more than a quiet machine's do."""
        return self.best > 1.15 * min(self)


# Beside the kernels' own target (moe_kernels.launch.lowering_for): with this one a whole program is
# for that GPU, its attention and dtypes included.
_target: ContextVar[float | None] = ContextVar("target", default=None)


@contextmanager
def compiling_for(capability: float) -> Iterator[None]:
    """Programs that are traced inside are for a GPU of this compute capability, which is absent."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def compute_capability() -> float | None:
    """Of the GPU of compiling_for, or of the first device. None: it is not an NVIDIA GPU."""
    if target := _target.get():
        return target
    device = jax.devices()[0]
    # AMD's GPUs are of the backend gpu, too.
    if jax.default_backend() != "gpu" or "cuda" not in device.client.platform_version:
        return None
    return float(device.compute_capability)


def gemm_rate(dtype: str, size: int | None = None, repeats: int = 6) -> float:
    """FLOP/s of a plain [size, size] matrix product on one device: 2 size^3 / seconds.

    The fastest of `repeats` runs counts: it stands for the limit, and interruptions only slow a
    run down.
    """
    # Large enough to reach the limit, small enough to take seconds.
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.min(seconds))


def peak_resident_bytes() -> int:
    """The largest resident size that this process has had, in bytes (Linux and macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Free memory of the first device in bytes, the host's for a CPU. None: not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        # MemAvailable counts the page cache that Linux would give up, MemFree does not.
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def require_space(folder: Path, needed: int) -> None:
    """UserError: the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the checkpoints of this run need {needed / 1e9:,.2f} GB in {folder}, and its disk "
            f"has {free / 1e9:,.2f} GB free: make room, or choose another --out"
        )


def require_memory(preset: str, needed: int) -> None:
    """UserError: a device has less than `needed` bytes free for parameters and optimizer."""
    available = available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{preset} needs {needed / 1e9:,.1f} GB for parameters and optimizer on each device, "
            f"which has {available / 1e9:,.1f} GB: choose a smaller preset (tiny, small) or "
            "shrink it with --model.layers, --model.moe.experts, …"
        )
