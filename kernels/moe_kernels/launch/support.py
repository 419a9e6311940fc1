"""Whether kernels can run here, for which GPU they are compiled, or why they cannot run."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax

# Compute capabilities are written times ten throughout, as in sm_80: 80 is 8.0.
MINIMUM_CAPABILITY = 80
"""Ampere. It is the first with bfloat16 products and asynchronous copies."""
FP8_CAPABILITY = 89
"""Ada, then Hopper. It is the first whose matrix units take E4M3."""
DEFAULT_CAPABILITY = 90
"""Hopper. Tile tables are read for it where no GPU and no target is given (interpreter, tests)."""

EXTRA = "moe_jax[kernels]"
"""What brings Triton and jax-triton. Only a GPU uses them, and they take a gigabyte of disk."""

MULTIPROCESSORS = {80: 108, 86: 72, 89: 58, 90: 132, 100: 148, 120: 170}
"""A100, A10, L4, H100, B200 and RTX 5090. They are needed for programs that are lowered without the
device."""
SMALL_MEMORY = (86, 89, 120, 121)
"""A program has 99 KiB of shared memory there. On the others it has 163 KiB or more."""

# A context variable rather than an argument: the target must reach launches that are traced deep
# inside a model, and two threads may trace for different targets.
_target: ContextVar[int | None] = ContextVar("target", default=None)


class Support(NamedTuple):
    """How kernels run here, and the reason."""

    name: Literal["gpu", "lower", "interpreter", "none"]
    reason: str


class UnavailableError(RuntimeError):
    """Kernels were asked for by name and cannot run. The message gives the reason."""


@contextmanager
def lowering_for(target: int) -> Iterator[None]:
    """Compiles kernels traced inside for the compute capability `target` (80, 86, 89, 90, ...).

    The program can be lowered, as by `jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))`.
    It cannot be run. The GPU need not be there.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def lowering_target() -> int | None:
    """The compute capability of `lowering_for`, None outside of it."""
    return _target.get()


def missing_package() -> str:
    """Which of the kernels' packages is missing, and how it gets here; empty if none is."""
    # find_spec and not import: Triton takes seconds. torch brings Triton without jax-triton.
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed (pip install '{EXTRA}'; Linux only)"
    return ""


def triton_support() -> Support:
    """Finds how kernels run here, without importing Triton.

    `gpu` needs an NVIDIA device of compute capability 8.0 or more. `lower` is inside lowering_for.
    `interpreter` (kernels run by NumPy, for tests) needs TRITON_INTERPRET=1 before Triton is
    imported.
    """
    if problem := missing_package():
        return Support("none", problem)
    # The interpreter comes before lowering: with TRITON_INTERPRET=1 Triton cannot compile at all.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Support("interpreter", "TRITON_INTERPRET=1")
    if target := _target.get():
        return _by_capability("lower", "lowering", target)
    if jax.default_backend() != "gpu":
        return Support("none", f"the devices are {jax.default_backend()}, not NVIDIA GPUs")
    device = jax.devices()[0]
    found = _capability_of(device)
    if found is None:
        version = getattr(device, "compute_capability", None)
        return Support("none", f"{device.device_kind} ({version}) is not an NVIDIA GPU")
    return _by_capability("gpu", device.device_kind, found)


def _by_capability(name: Literal["gpu", "lower"], device: str, found: int) -> Support:
    if found < MINIMUM_CAPABILITY:
        return Support("none", f"{device}: compute capability {found / 10} is below 8.0")
    return Support(name, f"{device}, compute capability {found / 10}")


def _capability_of(device: Any) -> int | None:
    """The compute capability times ten. None for a device without one, as AMD's ("gfx942")."""
    try:
        return round(float(getattr(device, "compute_capability", None) or "") * 10)
    except ValueError:
        return None


def fp8_support() -> Support:
    """triton_support for FP8 kernels. Compiling them needs a compute capability of 8.9 or more."""
    support = triton_support()
    if support.name in ("gpu", "lower") and capability() < FP8_CAPABILITY:
        reason = (
            f"compute capability {capability() / 10} has no FP8 matrix units (8.9 and above do)"
        )
        return Support("none", reason)
    return support


def require_triton() -> None:
    """Raises UnavailableError, with the reason and the alternatives, where kernels cannot run."""
    _raise_if_none(triton_support(), "Triton kernels")


def require_fp8() -> None:
    """Raises UnavailableError, as require_triton does, where FP8 kernels cannot run."""
    _raise_if_none(fp8_support(), "FP8 kernels")


def _raise_if_none(support: Support, kernels: str) -> None:
    if support.name == "none":
        raise UnavailableError(
            f"{kernels} cannot run: {support.reason}; use implementation 'auto' or 'xla', "
            "or TRITON_INTERPRET=1 to run them in NumPy (slow, for tests)"
        )


def capability() -> int:
    """The compute capability, times ten, that kernels are compiled for."""
    if target := _target.get():
        return target
    return _capability_of(jax.devices()[0]) or DEFAULT_CAPABILITY


def has_small_memory() -> bool:
    """Whether a program has 99 KiB of shared memory on the GPU that kernels are compiled for."""
    return capability() in SMALL_MEMORY


def multiprocessors() -> int:
    """The number of multiprocessors of the device that kernels run on or are lowered for."""
    # The device at hand counts only where it is the target: an H100 may lower for an A100.
    count = None if _target.get() else getattr(jax.devices()[0], "core_count", None)
    return count or MULTIPROCESSORS.get(capability(), MULTIPROCESSORS[DEFAULT_CAPABILITY])


def interpreting() -> bool:
    """Whether kernels are run by NumPy."""
    return triton_support().name == "interpreter"
