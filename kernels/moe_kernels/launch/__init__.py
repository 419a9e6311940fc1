"""How Triton kernels run: compiled by jax-triton, interpreted by NumPy, recorded, or not at all."""

from moe_kernels.launch.call import Launch, Tuning, launch, next_power_of_two, recording
from moe_kernels.launch.support import (
    FP8_CAPABILITY,
    MINIMUM_CAPABILITY,
    MULTIPROCESSORS,
    Support,
    UnavailableError,
    capability,
    fp8_support,
    interpreting,
    lowering_for,
    missing_package,
    multiprocessors,
    require_fp8,
    require_triton,
    triton_support,
)

__all__ = [
    "FP8_CAPABILITY",
    "MINIMUM_CAPABILITY",
    "MULTIPROCESSORS",
    "Launch",
    "Support",
    "Tuning",
    "UnavailableError",
    "capability",
    "fp8_support",
    "interpreting",
    "launch",
    "lowering_for",
    "missing_package",
    "multiprocessors",
    "next_power_of_two",
    "recording",
    "require_fp8",
    "require_triton",
    "triton_support",
]
