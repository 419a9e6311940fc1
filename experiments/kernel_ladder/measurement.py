"""The rungs timed on the GPU at hand. No GPU has run this yet."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import capability
from moe_kernels.timing import paired

from experiments.kernel_ladder.cases import DTYPE, make_inputs, make_routing
from experiments.kernel_ladder.ranges import Range, Step, covering
from experiments.kernel_ladder.rungs import Rung, built, possible, rung_of, train_of, train_with_y

LARGEST_GEMM = 8192
"""Side of the plain GEMM. Few tokens have a smaller one, so that it does not dwarf the layer."""
TRAINED = ("raster", "xla", "ragged_dot")
"""Rungs that are measured with their backward pass as well."""

Calls = dict[str, Callable[[], Any]]


class Measured(NamedTuple):
    """Every rung on one shape that compiles and fits into memory."""

    steps: dict[str, Step]
    """By rung."""
    seconds: dict[str, list[float]]
    """Round by round: each rung, `gemm` (the plain GEMM, scaled to the layer's forward FLOPs), and
    forward with backward as `RUNG train` and `with y`."""


def measure(shape: Shape, seed: int, rounds: int) -> Measured:
    """Every rung, and the plain GEMM, once in each round."""
    inputs = make_inputs(shape, seed)
    plan = make_routing(shape, seed)
    calls: Calls = {}
    notes: dict[str, str] = {}
    for rung in possible(capability()):
        with built(rung, DTYPE, plan.block_rows):
            _add(rung.name, rung.layer, (*prepared(rung, inputs), plan), calls, notes)
    for name in TRAINED:
        arguments = (*inputs, plan, inputs[0])
        _add(f"{name} train", partial(train_of, rung_of(name).layer), arguments, calls, notes)
    y = jnp.ones((plan.assignment.size, shape.width), DTYPE)
    _add("with y", train_with_y, (y, *inputs, plan, inputs[0]), calls, notes)
    side = min(LARGEST_GEMM, shape.tokens)
    square = jnp.ones((side, side), DTYPE)
    calls["gemm"] = partial(jax.jit(jnp.matmul), square, square)
    seconds = paired(calls, rounds)
    seconds["gemm"] = [t * shape.flops / (2.0 * side**3) for t in seconds["gemm"]]
    steps = {
        rung.name: Step(covering(seconds[rung.name]), note=notes[rung.name])
        for rung in possible(capability())
        if rung.name in seconds
    }
    return Measured(steps, seconds)


def prepared(rung: Rung, inputs: list[Array]) -> tuple[Any, ...]:
    """The rung's inputs, whose matrices may be made once and not in every step."""
    x, weights, *matrices = inputs
    if rung.prepare:
        matrices = jax.jit(rung.prepare)(*matrices)
    return (x, weights, *matrices)


def _add(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    calls: Calls,
    notes: dict[str, str],
) -> None:
    """Compiles a call and runs it once. One that does not fit is left out, with its reason."""
    try:
        # jit caches by function: a lambda of its own keeps the rungs of one layer apart.
        compiled = jax.jit(lambda *a: function(*a)).lower(*arguments).compile()
        call = partial(compiled, *arguments)
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:  # out of memory, above all of ragged_dot
        print(f"{name}: left out: {str(error).splitlines()[0][:150]}", flush=True)
        return
    memory: Any = compiled.memory_analysis()
    calls[name] = call
    notes[name] = f"{memory.temp_size_in_bytes / 1e9:.2f} GB of temporaries"


def speed_without_y(seconds: Mapping[str, list[float]]) -> Range | None:
    """Forward and backward without y kept over the same with y, which is given."""
    if not {"raster train", "with y"} <= set(seconds):
        return None
    pairs = zip(seconds["raster train"], seconds["with y"], strict=True)
    return covering(kept / own for own, kept in pairs)
