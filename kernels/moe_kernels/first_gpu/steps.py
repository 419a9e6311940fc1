"""The steps by name, as the worker runs them."""

from collections.abc import Callable, Mapping

from moe_kernels.first_gpu import correctness, programs, speed
from moe_kernels.first_gpu.context import Context, Outcome
from moe_kernels.first_gpu.environment import environment

STEPS: Mapping[str, Callable[[Context], Outcome]] = {
    "environment": environment,
    "correctness": correctness.correctness,
    "launches": speed.launches,
    "layers": speed.layers,
    "memory": speed.memory,
    "ladder": programs.ladder,
    "tiles": speed.tiles,
    "soak": correctness.random_cases,
    "memcheck": programs.memcheck,
    "racecheck": programs.racecheck,
    "profile": programs.profile,
    "large launches": speed.large_launches,
    "large layers": speed.large_layers,
    "decoding": speed.decoding,
}
