"""The rungs timed on the GPU at hand. No GPU has run this yet."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from moe_kernels.launch import capability
from moe_kernels.timing import paired, ratio

from experiments.kernel_ladder.cases import DTYPE, Shape, Step, make_inputs, make_routing
from experiments.kernel_ladder.rungs import built, possible, train, train_with_y

LARGEST_GEMM = 8192
"""Side of the plain GEMM. Few tokens have a smaller one, so that it does not dwarf the layer."""

Rounds = dict[str, list[float]]
"""Seconds of each call, round by round."""


class Measured(NamedTuple):
    """Every rung on one shape."""

    steps: dict[str, Step]
    """Medians, by rung."""
    seconds: Rounds
    """By rung. `gemm` is the plain GEMM, scaled to the layer's FLOPs."""


def measure(shape: Shape, seed: int, rounds: int) -> Measured:
    """Every rung, and the plain GEMM, once in each round."""
    inputs = make_inputs(shape, seed)
    plan = make_routing(shape, seed)
    calls: dict[str, Callable[[], Any]] = {}
    notes = {}
    for rung in possible(capability()):
        with built(rung, DTYPE, plan.block_rows):
            # jit caches by function: a lambda of its own keeps the rungs of one layer apart.
            compiled = (
                jax.jit(lambda *a, layer=rung.layer: layer(*a)).lower(*inputs, plan).compile()
            )
        memory: Any = compiled.memory_analysis()
        calls[rung.name] = partial(compiled, *inputs, plan)
        notes[rung.name] = f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries"
    side = min(LARGEST_GEMM, shape.tokens)
    square = jnp.ones((side, side), DTYPE)
    calls["gemm"] = partial(jax.jit(jnp.matmul), square, square)
    seconds = paired(calls, rounds)
    seconds["gemm"] = [t * shape.flops / (2.0 * side**3) for t in seconds["gemm"]]
    steps = {n: Step(1e3 * float(np.median(seconds[n])), None, notes[n]) for n in notes}
    return Measured(steps, seconds)


def backward_speedup(shape: Shape, seed: int, rounds: int) -> float:
    """Speed of forward and backward without y kept over that with y, which is given."""
    inputs = make_inputs(shape, seed)
    plan = make_routing(shape, seed)
    y = jnp.ones((plan.assignment.size, shape.width), DTYPE)
    arguments = (*inputs, plan, inputs[0])
    calls = {
        "without": partial(jax.jit(train), *arguments),
        "with": partial(jax.jit(train_with_y), y, *arguments),
    }
    seconds = paired(calls, rounds)
    return ratio(seconds["without"], seconds["with"])
