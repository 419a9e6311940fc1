"""How Triton kernels run: compiled by jax-triton, interpreted by NumPy, recorded, or not at all."""

from moe_kernels.launch.call import Launch, Tuning, launch, next_power_of_two, recording
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
    multiprocessors,
    require_fp8,
    require_triton,
    triton_support,
)

__all__ = [
    "FP8_CAPABILITY",
    "MINIMUM_CAPABILITY",
    "MULTIPROCESSORS",
    "SMALL_MEMORY",
    "Launch",
    "Support",
    "Tuning",
    "UnavailableError",
    "capability",
    "fp8_support",
    "has_small_memory",
    "interpreting",
    "launch",
    "lowering_for",
    "multiprocessors",
    "next_power_of_two",
    "recording",
    "require_fp8",
    "require_triton",
    "triton_support",
]
