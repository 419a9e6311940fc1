"""How Triton kernels run: compiled by jax-triton, interpreted by NumPy, recorded, or not at all."""

from moe_kernels.launch.asynchronous import (
    ASYNC_CAPABILITIES,
    async_support,
    compile_gluon,
    require_async,
)
from moe_kernels.launch.call import Launch, Tuning, launch, next_power_of_two, recording
from moe_kernels.launch.cost import Cost
from moe_kernels.launch.probe import launch_fault
from moe_kernels.launch.support import (
    FP8_CAPABILITY,
    MINIMUM_CAPABILITY,
    MULTIPROCESSORS,
    SMALL_MEMORY,
    Support,
    UnavailableError,
    capability,
    fp8_support,
    has_small_memory,
    interpreting,
    lowering_for,
    missing_package,
    multiprocessors,
    require_fp8,
    require_triton,
    triton_support,
)

__all__ = [
    "ASYNC_CAPABILITIES",
    "FP8_CAPABILITY",
    "MINIMUM_CAPABILITY",
    "MULTIPROCESSORS",
    "SMALL_MEMORY",
    "Cost",
    "Launch",
    "Support",
    "Tuning",
    "UnavailableError",
    "async_support",
    "capability",
    "compile_gluon",
    "fp8_support",
    "has_small_memory",
    "interpreting",
    "launch",
    "launch_fault",
    "lowering_for",
    "missing_package",
    "multiprocessors",
    "next_power_of_two",
    "recording",
    "require_async",
    "require_fp8",
    "require_triton",
    "triton_support",
]
