"""Each launch of the layer by itself, on arrays of a real layer's sizes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_kernels.bench.peers import Peers
from moe_kernels.bench.shapes import Shape, make_inputs
from moe_kernels.experts.launches import (
    combine_rows,
    grouped_product,
    hidden_gradient,
    matrix_gradient,
    up_projection,
)
from moe_kernels.gate import GateConfig, gate
from moe_kernels.schedule import choose_block_rows, schedule

PRODUCTS = {  # products of D·F numbers for an assignment: 3 in the forward pass, 6 in the backward
    "up": 2,
    "down": 1,
    "hidden gradient": 1,
    "down gradient": 1,
    "gate_up gradient": 2,
    "input gradient": 2,
}
"""The launches that multiply. The input's gradient is the down projection's kernel on gate_up^T."""
LAUNCHES = ("gate", "schedule", *PRODUCTS, "combine", "combine, unweighted")
"""All of a training step. `schedule` is four launches, and every other name is one. The sum without
weights is the last step of the input's gradient."""


class Work(NamedTuple):
    """A launch as a function of arrays, and the least that it has to do."""

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    flops: float
    """0 for a launch that moves, compares and sums."""
    bytes: float
    """Read and written, each array once. 0 for a product, which reads its operands many times."""


def all_work(shape: Shape, dtype: str, peers: Peers) -> dict[str, Work]:
    """The work of every launch, by name.

    Intermediate arrays are drawn and not computed, so that no launch needs another one to run.
    """
    inputs = make_inputs(shape, dtype)
    plan = jax.jit(peers.make_plan, static_argnums=1)(inputs.experts, shape.experts)
    z, hidden, y, logits = _intermediates(shape, dtype, plan.assignment.size)
    rows = choose_block_rows(inputs.experts.size, shape.experts)
    config = GateConfig(shape.per_token, "softmax")
    x, weights, gate_up, down, experts, d_out = inputs
    # Arrays of a program's constants would be folded by the compiler: all of them are arguments.
    products: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "up": (partial(up_projection, save=True), (x, gate_up, plan)),
        "down": (grouped_product, (hidden, down, plan)),
        "hidden gradient": (hidden_gradient, (d_out, down, z, weights, plan)),
        "down gradient": (partial(matrix_gradient, gathered="right"), (hidden, d_out, plan)),
        "gate_up gradient": (partial(matrix_gradient, gathered="left"), (x, z, plan)),
        "input gradient": (partial(grouped_product, transposed=True), (z, gate_up, plan)),
    }
    one = shape.flops / 3
    work = {
        name: Work(*products[name], flops=count * one, bytes=0.0)
        for name, count in PRODUCTS.items()
    }
    size = experts.size
    itemsize = x.dtype.itemsize
    # Logits are read and scores written in float32, experts and weights are 8 bytes a choice.
    gate_bytes = 8.0 * logits.size + 8.0 * size
    sort_bytes = 4.0 * (2 * size + plan.assignment.size)
    sum_bytes = float(itemsize) * (size + len(x)) * shape.width + 8.0 * size
    return work | {
        "gate": Work(lambda array: gate(array, None, config), (logits,), 0.0, gate_bytes),
        "schedule": Work(
            lambda array: schedule(array, shape.experts, rows), (experts,), 0.0, sort_bytes
        ),
        "combine": Work(combine_rows, (y, plan.row, weights), 0.0, sum_bytes),
        "combine, unweighted": Work(
            partial(combine_rows, weights=None), (y, plan.row), 0.0, sum_bytes
        ),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def _intermediates(shape: Shape, dtype: str, rows: int) -> tuple[Array, ...]:
    """z [R, 2F], hidden [R, F], y [R, D] and logits [T, E]."""
    keys = jax.random.split(jax.random.key(1), 4)
    widths = (2 * shape.hidden, shape.hidden, shape.width)
    drawn = [jax.random.normal(keys[i], (rows, width), dtype) for i, width in enumerate(widths)]
    return (*drawn, jax.random.normal(keys[3], (shape.tokens, shape.experts), jnp.float32))
