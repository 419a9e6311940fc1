"""The layer beside its limits and its peers at one shape."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.moe_layer.peers import VARIANTS, fastest_peer, ragged_calls, transformers_calls
from experiments.moe_layer.timing import (
    Call,
    Times,
    forward_and_train,
    gemm_call,
    jax_call,
    layer_calls,
    layer_row,
    paired_rounds,
)
from moe_jax.base.result import Measurement
from moe_jax.moe import xla
from moe_jax.moe.plan import make_plan
from moe_jax.study.layer_case import Inputs, Shape, layer, make_inputs, moe_config
from moe_jax.study.live_table import LiveTable

PEERS = tuple(f"transformers {variant}" for variant in VARIANTS)
ROWS = ("xla", "reference", "ragged_dot", *PEERS, "xla skewed", "xla bfloat16")
"""What is compared at the reference shape. Skewed: half of all rows are on one expert."""


def skewed_calls(shape: Shape, inputs: Inputs, seed: int) -> list[Call]:
    """xla's plan and mixture. Every second assignment is to expert 0, the others are random."""
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


def reference_table(times: Times, notes: dict[str, str], shape: Shape, table: LiveTable) -> None:
    """The limits, then a row an implementation."""
    for name in ("plain gemm", "gemm", "gemm bfloat16"):
        milliseconds = 1e3 * (times.median(name) or 0.0)
        rate = 1e-9 * (times.rate(name) or 0.0)
        of_gemm = times.rate_of(name)
        table.row("limit", name, milliseconds=milliseconds, GFLOP_s=rate, of_gemm=of_gemm)
    for name in ROWS:
        layer_row(table, str(shape), name, times, notes.get(name, ""))


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
    speedups = {
        "forward_over_transformers": ("xla forward", fastest_peer(times, "forward")),
        "train_over_transformers": ("xla train", fastest_peer(times, "train")),
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

    def bits() -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(call.run())]

    return bits() == bits()
