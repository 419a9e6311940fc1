"""The layer beside its limits and its peers at one shape, its memory, and its parts."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.moe_layer.cases import (
    Call,
    Inputs,
    Shape,
    Table,
    Times,
    forward_and_train,
    gemm_call,
    jax_call,
    layer,
    layer_calls,
    make_inputs,
    moe_config,
    paired_rounds,
)
from experiments.moe_layer.peers import VARIANTS, fastest_peer, ragged_calls, transformers_calls
from moe_jax.base.result import Measurement
from moe_jax.moe import xla
from moe_jax.moe.experts import swiglu
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.route import route

PEERS = tuple(f"transformers {variant}" for variant in VARIANTS)
ROWS = ("xla", "reference", "ragged_dot", *PEERS, "xla skewed", "xla bfloat16")
"""What is compared at the reference shape; skewed: half of all rows on one expert."""


def skewed_calls(shape: Shape, inputs: Inputs, seed: int) -> list[Call]:
    """xla's plan and mixture where every second assignment is to expert 0, the others to any."""
    random = np.random.default_rng(seed)
    flat = random.integers(0, shape.experts, shape.rows, np.int32)
    flat[::2] = 0
    experts = jnp.asarray(flat.reshape(shape.tokens, shape.per_token))
    weights = jnp.asarray(random.random(experts.shape, np.float32))

    def run(x: Array, weights: Array, gate_up: Array, down: Array, experts: Array) -> Array:
        return xla.mixture(x, weights, gate_up, down, make_plan(experts, shape.experts))

    arguments = (inputs.x, weights, inputs.gate_up, inputs.down)
    both = (inputs.cotangent, arguments)
    return forward_and_train("xla skewed", run, both, (experts,), shape.flops)


def bfloat16_calls(shape: Shape, seed: int) -> list[Call]:
    """The batched GEMM and the layer with x and the experts' matrices in bfloat16."""
    narrow = replace(shape, dtype="bfloat16")
    inputs = make_inputs(narrow, seed)
    both = (inputs.cotangent, inputs.arguments)
    calls = forward_and_train("xla bfloat16", layer(moe_config(shape)), both, flops=shape.flops)
    return [gemm_call(narrow, seed, "gemm bfloat16"), *calls]


def plain_gemm_call(size: int) -> Call:
    """A product of two [size, size] matrices."""
    a = jnp.ones((size, size), jnp.float32)
    return jax_call("plain gemm", jnp.matmul, a, a, flops=2.0 * size**3)


def reference_times(
    shape: Shape, gemm: int, rounds: int, seed: int
) -> tuple[Times, dict[str, str]]:
    """Everything at the reference shape in the same rounds, and why some calls are missing."""
    inputs = make_inputs(shape, seed)
    ragged, ragged_note = ragged_calls(shape, inputs)
    peers, notes = transformers_calls(shape, inputs)
    calls = [
        plain_gemm_call(gemm),
        gemm_call(shape, seed),
        *layer_calls(shape, inputs, "xla"),
        *layer_calls(shape, inputs, "reference"),
        *ragged,
        *peers,
        *skewed_calls(shape, inputs, seed),
        *bfloat16_calls(shape, seed),
    ]
    reasons = {f"transformers {variant}": note for variant, note in notes.items()}
    return paired_rounds(calls, rounds, str(shape)), {"ragged_dot": ragged_note, **reasons}


def reference_table(times: Times, notes: dict[str, str], shape: Shape, table: Table) -> None:
    """The limits, then a row an implementation."""
    for name in ("plain gemm", "gemm", "gemm bfloat16"):
        seconds, rate = times.median(name) or 0.0, times.rate(name) or 0.0
        of = times.rate_of(name)
        table.row("limit", name, milliseconds=1e3 * seconds, GFLOP_s=rate / 1e9, of_gemm=of)
    for name in ROWS:
        table.layer(str(shape), name, times, notes.get(name, ""))


def reference_measurements(times: Times, notes: dict[str, str], shape: Shape) -> list[Measurement]:
    """Fractions of the limit, and how many times as fast as each peer."""
    gemm = f"batched GEMM, {(times.rate('gemm') or 0) / 1e9:.0f} GFLOP/s, {shape}"
    fractions = {
        "forward_of_gemm": "xla forward",
        "train_of_gemm": "xla train",
        "skewed_forward_of_gemm": "xla skewed forward",
        "skewed_train_of_gemm": "xla skewed train",
        "bf16_train_of_fp32_gemm": "xla bfloat16 train",
    }
    forward_peer, train_peer = fastest_peer(times, "forward"), fastest_peer(times, "train")
    speedups = {
        "forward_over_transformers": ("xla forward", forward_peer),
        "train_over_transformers": ("xla train", train_peer),
        "forward_over_ragged_dot": ("xla forward", "ragged_dot forward"),
        "forward_over_reference": ("xla forward", "reference forward"),
        "train_over_reference": ("xla train", "reference train"),
        "bf16_over_fp32": ("xla bfloat16 train", "xla train"),
        "bf16_forward_over_fp32": ("xla bfloat16 forward", "xla forward"),
        "bf16_gemm_over_fp32": ("gemm bfloat16", "gemm"),
    }
    found = []
    for name, call in fractions.items():
        value = times.rate_of(call)
        found.append(Measurement(name, value, "of the GEMM's rate", gemm, value))
    for name, (ours, other) in speedups.items():
        value = times.speedup(ours, other)
        missing = "" if value else notes.get(other.rpartition(" ")[0], "")
        baseline = f"{other}: {missing}" if missing else other
        found.append(Measurement(name, value, "times as fast", baseline, value))
    found.append(Measurement("gemm_spread", times.spread("gemm"), "9th decile / 1st", gemm))
    same = all(repeatable(times.calls[name]) for name in ("xla train", "xla skewed train"))
    return [*found, Measurement("deterministic", int(same), "1 if equal bit for bit")]


def repeatable(call: Call) -> bool:
    """Whether two runs give the same bits in every output."""
    first, second = (
        [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(call.run())] for _ in range(2)
    )
    return first == second


@partial(jax.jit, static_argnums=0)
def routed(shape: Shape, inputs: Inputs) -> tuple[Array, Array, Plan]:
    """The chosen experts [T, K], the gate's weights and the plan for these inputs."""
    chosen = route(inputs.x @ inputs.router, jnp.zeros(shape.experts), moe_config(shape))
    return chosen.experts, chosen.weights, make_plan(chosen.experts, shape.experts)


def saved_bytes(shape: Shape, inputs: Inputs) -> tuple[int, int]:
    """(measured, formula): bytes kept between xla's forward and backward pass.

    Measured on the compiled program whose outputs are the residuals of the vjp, less the matrices,
    which are there anyhow, and less the tuple of 8-byte addresses that XLA counts. The formula: x
    [T, D], z [E, C, 2F], weights [T, K] and the plan.
    """
    _, weights, plan = routed(shape, inputs)
    arguments = (inputs.x, weights, inputs.gate_up, inputs.down)

    def residuals(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> Any:
        return jax.vjp(partial(xla.mixture, plan=plan), x, weights, gate_up, down)[1]

    kept = jax_call("residuals", residuals, *arguments, plan)
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
    of_formula, of_unpadded = measured / formula, measured / unpadded
    what = "x, z [E, C, 2F], gate weights, plan"
    return [
        Measurement("saved_bytes", measured, "bytes", str(shape)),
        Measurement("saved_bytes_of_formula", of_formula, "ratio", what, of_formula),
        Measurement("saved_bytes_of_unpadded", of_unpadded, "ratio", "x, z [S, 2F]", of_unpadded),
    ]


def part_calls(shape: Shape, inputs: Inputs) -> list[Call]:
    """xla's steps alone, at its sizes; without the loop over what hot experts have beyond C."""
    x, router, gate_up, down = inputs.arguments
    config, bias = moe_config(shape), jnp.zeros(shape.experts)
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


def part_shares(shape: Shape, rounds: int, seed: int, table: Table) -> list[Measurement]:
    """Each part's time as a share of the forward pass; `rest` is what they leave."""
    inputs = make_inputs(shape, seed)
    parts, whole = part_calls(shape, inputs), layer_calls(shape, inputs, "xla")[0]
    times = paired_rounds([whole, *parts], rounds, "parts")
    shares = {part.name: times.speedup(whole.name, part.name) or 0.0 for part in parts}
    shares["rest"] = 1 - sum(shares.values())
    seconds = times.median(whole.name) or 0.0
    for name, share in shares.items():
        table.row("part of xla's forward", name, milliseconds=1e3 * share * seconds, share=share)
    return [Measurement(f"share.{name}", s, "of the forward pass") for name, s in shares.items()]
