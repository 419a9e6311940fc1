"""The steps of the layer's forward pass, each timed alone."""

import jax.numpy as jnp
from jax import Array

from experiments.moe_layer.memory import routed
from experiments.moe_layer.timing import Call, jax_call, layer_calls, paired_rounds
from moe_jax.base.result import Measurement
from moe_jax.moe import xla
from moe_jax.moe.experts import swiglu
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.route import route
from moe_jax.study.layer_case import Inputs, Shape, make_inputs, moe_config
from moe_jax.study.live_table import LiveTable


def part_calls(shape: Shape, inputs: Inputs) -> list[Call]:
    """xla's steps alone, at its sizes.

    The loop over the rows that hot experts have beyond C is not among them.
    """
    x, router, gate_up, down = inputs.arguments
    config = moe_config(shape)
    bias = jnp.zeros(shape.experts)
    experts, weights, plan = routed(shape, inputs)
    share = xla.batch_share(plan.most, shape.experts, shape.tokens)

    def choose(x: Array, router: Array) -> tuple[Array, Array]:
        chosen = route(x @ router, bias, config)
        return chosen.experts, chosen.weights

    def gather(x: Array, weights: Array, plan: Plan) -> Array:
        return xla._take(x, xla._batch_rows(plan, weights, share).source)

    def combine(y: Array, weights: Array, plan: Plan) -> Array:
        slots = xla._slots(plan, share)
        return xla._sum_slots(y, slots, jnp.where(slots.inside, weights, 0.0))

    rows = gather(x, weights, plan)
    z = rows @ gate_up
    return [
        jax_call("route", choose, x, router),
        jax_call("plan", lambda experts: make_plan(experts, shape.experts), experts),
        jax_call("gather", gather, x, weights, plan),
        jax_call("up-projection", jnp.matmul, rows, gate_up),
        jax_call("down-projection", lambda z, down: swiglu(z) @ down, z, down),
        jax_call("combine", combine, swiglu(z) @ down, weights, plan),
    ]


def part_shares(shape: Shape, rounds: int, seed: int, table: LiveTable) -> list[Measurement]:
    """Each part's time as a share of the forward pass. `rest` is the time of no part."""
    inputs = make_inputs(shape, seed)
    parts = part_calls(shape, inputs)
    whole = layer_calls(shape, inputs, "xla")[0]
    times = paired_rounds([whole, *parts], rounds, "parts")
    shares = {part.name: times.speedup(whole.name, part.name) or 0.0 for part in parts}
    shares["rest"] = 1 - sum(shares.values())
    seconds = times.median(whole.name) or 0.0
    for name, share in shares.items():
        table.row("part of xla's forward", name, milliseconds=1e3 * share * seconds, share=share)
    return [Measurement(f"share.{name}", s, "of the forward pass") for name, s in shares.items()]
