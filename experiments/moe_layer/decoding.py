"""Decoding: a few tokens, whose time is that of reading the experts' matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from experiments.moe_layer.timing import Call, jax_call, paired_rounds
from moe_jax.base.result import Measurement
from moe_jax.study.layer_case import Inputs, Shape, layer, make_inputs, moe_config
from moe_jax.study.live_table import LiveTable


def bandwidth_call(megabytes: int) -> Call:
    """Reads an array once: the sum of all its numbers. Its `flops` are bytes."""
    # 250,000 numbers of four bytes in a megabyte.
    numbers = jnp.ones(megabytes * 250_000, jnp.float32)
    return jax_call("read", jnp.sum, numbers, flops=float(numbers.nbytes))


def used_experts(inputs: Inputs, tokens: int, per_token: int) -> int:
    """Distinct experts of the first tokens: the K largest logits of each."""
    logits = np.asarray(inputs.x[:tokens] @ inputs.router)
    return len(np.unique(np.argsort(logits, axis=1)[:, -per_token:]))


def decode_call(base: Shape, inputs: Inputs, tokens: int) -> Call:
    """The forward pass of the first tokens."""
    x, *matrices = inputs.arguments
    return jax_call(f"T = {tokens}", layer(moe_config(base)), x[:tokens], *matrices)


@dataclass(frozen=True)
class Decode:
    """Seconds of decoding steps, beside those of reading matrices at the measured bandwidth."""

    base: Shape
    tokens: list[int]
    seconds: list[float]
    used: list[float]
    """Seconds of reading the used experts' matrices once, for each count of `tokens`."""
    every: float
    """Seconds of reading all experts' matrices once."""


def decode(
    base: Shape, tokens: Sequence[int], rounds: int, megabytes: int, seed: int, table: LiveTable
) -> Decode:
    """Times T = 1, 2, … in rounds with the reading of a large array.

    That reading measures the bandwidth. It also empties the processor's caches before each round.
    """
    inputs = make_inputs(replace(base, tokens=max(tokens)), seed)
    calls = [decode_call(base, inputs, count) for count in tokens]
    times = paired_rounds(
        [bandwidth_call(megabytes), *calls], rounds, f"decoding, E={base.experts}"
    )
    bandwidth = times.rate("read") or 1.0
    every = base.experts * base.expert_bytes / bandwidth
    seconds = []
    used = []
    for count, call in zip(tokens, calls, strict=True):
        experts = used_experts(inputs, count, base.per_token)
        seconds.append(times.median(call.name) or 0.0)
        used.append(experts * base.expert_bytes / bandwidth)
        table.row(
            f"decoding, E={base.experts} K={base.per_token}",
            call.name,
            forward_ms=1e3 * seconds[-1],
            experts_used=experts,
            of_reading_used=seconds[-1] / used[-1],
            of_reading_all=seconds[-1] / every,
            read_GB_s=bandwidth / 1e9,
        )
    return Decode(base, list(tokens), seconds, used, every)


def decode_measurements(found: Decode, suffix: str = "") -> list[Measurement]:
    """The first T's time relative to reading every expert's matrices, and the used ones'."""
    of = {"all": found.seconds[0] / found.every, "used": found.seconds[0] / found.used[0]}
    return [
        Measurement(
            f"decode_of_{which}_experts_T{found.tokens[0]}{suffix}",
            ratio,
            "of the time",
            f"reading {which} experts' matrices once, {found.base}",
            ratio,
        )
        for which, ratio in of.items()
    ]
