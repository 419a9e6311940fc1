"""Which implementation of the experts runs: the reference, plain XLA, or Triton kernels."""

from collections.abc import Callable
from functools import partial

from jax import Array
from moe_kernels import experts as triton_experts
from moe_kernels import experts_async as triton_experts_async
from moe_kernels import experts_fp8 as triton_experts_fp8
from moe_kernels.launch import (
    MINIMUM_CAPABILITY,
    fp8_support,
    missing_package,
    triton_support,
)

from moe_jax.base.machine import compute_capability
from moe_jax.config import MoEConfig
from moe_jax.moe import reference, xla
from moe_jax.moe.precision import FP8

Mixture = Callable[..., Array]
"""(x [T, D], weights [T, K], gate_up [E, D, 2F], down [E, F, D], plan) -> outputs [T, D]."""
IMPLEMENTATIONS: dict[str, Mixture] = {
    "reference": reference.mixture,
    "xla": xla.mixture,
    "triton": triton_experts.mixture,
    "triton_async": triton_experts_async.mixture,
}
"""By `model.moe.implementation`."""


def implementation(name: str, precision: str = "compute") -> str:
    """The name of the implementation that runs, which is `name` itself unless it is "auto".

    `auto` is triton on GPUs that can run it (compute capability 8.0, or 8.9 for precision fp8), and
    xla anywhere else. It is never triton_async, which no GPU has run yet. A name given explicitly
    is never replaced: train.checks refuses a run that cannot have it.
    """
    if name != "auto":
        return name
    # "lower": no GPU here, but the programs are compiled for one (moe_kernels.launch).
    support = fp8_support() if precision == "fp8" else triton_support()
    return "triton" if support.name in ("gpu", "lower") else "xla"


def missing_kernels(name: str) -> str:
    """What to install where `auto` would use the kernels if they were there; empty elsewhere."""
    able = 10 * (compute_capability() or 0) >= MINIMUM_CAPABILITY
    problem = missing_package()
    return f"experts run on XLA's path: {problem}" if name == "auto" and able and problem else ""


def uses_kernels(config: MoEConfig) -> bool:
    """Whether routing and planning (steps 1 and 2) run as Triton kernels, too."""
    return implementation(config.implementation, config.precision).startswith("triton")


def mixture_of(config: MoEConfig) -> Mixture:
    """The function that computes the experts under these settings, precision included."""
    name = implementation(config.implementation, config.precision)
    if config.precision == "compute":
        return IMPLEMENTATIONS[name]
    if name == "triton":
        power_of_two = config.fp8_scales == "power_of_two"
        return partial(triton_experts_fp8.mixture, power_of_two=power_of_two)
    return partial(xla.mixture, rounding=FP8[config.fp8_scales])
