"""Bytes that the layer keeps between its forward and its backward pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.moe_layer.timing import jax_call
from moe_jax.base.result import Measurement
from moe_jax.moe import xla
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.route import route
from moe_jax.study.layer_case import Inputs, Shape, make_inputs, moe_config


@partial(jax.jit, static_argnums=0)
def routed(shape: Shape, inputs: Inputs) -> tuple[Array, Array, Plan]:
    """The chosen experts [T, K], the gate's weights and the plan for these inputs."""
    chosen = route(inputs.x @ inputs.router, jnp.zeros(shape.experts), moe_config(shape))
    return chosen.experts, chosen.weights, make_plan(chosen.experts, shape.experts)


def saved_bytes(shape: Shape, inputs: Inputs) -> tuple[int, int]:
    """(measured, formula): bytes kept between xla's forward and backward pass.

    Measured: the outputs of a compiled program that returns the residuals of the vjp, without the
    experts' matrices, which are parameters. The formula: x [T, D], z [E, C, 2F], weights [T, K] and
    the plan.
    """
    _, weights, plan = routed(shape, inputs)
    arguments = (inputs.x, weights, inputs.gate_up, inputs.down)

    def residuals(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> Any:
        return jax.vjp(partial(xla.mixture, plan=plan), x, weights, gate_up, down)[1]

    kept = jax_call("residuals", residuals, *arguments, plan)
    # XLA counts the tuple of the outputs' addresses, 8 bytes each, among the outputs.
    addresses = 8 * len(jax.tree.leaves(kept.run()))
    measured = (kept.output or 0) - addresses - inputs.gate_up.nbytes - inputs.down.nbytes
    share = xla.batch_share(plan.most, shape.experts, shape.tokens)
    z = shape.experts * share * 2 * shape.hidden * inputs.x.itemsize
    plan_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(plan))
    return measured, inputs.x.nbytes + z + weights.nbytes + plan_bytes


def memory_measurements(shape: Shape, seed: int) -> list[Measurement]:
    """The saved bytes beside their formula, and beside x and z without padding."""
    measured, formula = saved_bytes(shape, make_inputs(shape, seed))
    unpadded = 4 * (shape.tokens * shape.width + shape.rows * 2 * shape.hidden)
    of_formula = measured / formula
    of_unpadded = measured / unpadded
    what = "x, z [E, C, 2F], gate weights, plan"
    return [
        Measurement("saved_bytes", measured, "bytes", str(shape)),
        Measurement("saved_bytes_of_formula", of_formula, "ratio", what, of_formula),
        Measurement("saved_bytes_of_unpadded", of_unpadded, "ratio", "x, z [S, 2F]", of_unpadded),
    ]
