"""How the layer's cost grows with T, E and K; decoding; and the proportions of real models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from experiments.moe_layer.cases import (
    Call,
    Inputs,
    Shape,
    Table,
    Times,
    gemm_call,
    jax_call,
    layer,
    layer_calls,
    make_inputs,
    moe_config,
    paired_rounds,
    slope,
)
from experiments.moe_layer.peers import fastest_peer, transformers_calls
from moe_jax.base.result import Measurement

MODELS = {
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
    "Qwen1.5-MoE": (2048, 1408, 60, 4),
    "Llama4-Scout": (5120, 8192, 16, 1),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}
"""D, F, E, K as published."""

BESIDE = ("xla", "reference", "transformers eager", "transformers grouped_mm")
"""What the real models' proportions are timed with."""

FIELDS = {"T": "tokens", "E": "experts", "K": "per_token"}


@dataclass(frozen=True)
class Point:
    """One size of a scaling curve: seconds, temporary bytes, and the GEMM's time for the FLOPs."""

    value: int
    forward: float
    train: float
    gemm: float
    forward_bytes: int
    train_bytes: int


def scaling_point(shape: Shape, value: int, rounds: int, seed: int) -> Point:
    """xla's layer at one size; `gemm` is the time of forward and backward at the GEMM's rate."""
    gemm = gemm_call(shape, seed)
    calls = layer_calls(shape, make_inputs(shape, seed), "xla")
    times = paired_rounds([gemm, *calls], rounds, f"scaling, {shape}")
    forward, train = (times.median(call.name) or 0.0 for call in calls)
    ideal = 3 * shape.flops / (times.rate("gemm") or 1.0)
    return Point(value, forward, train, ideal, calls[0].temporary or 0, calls[1].temporary or 0)


def scaling_curve(
    letter: str, values: Sequence[int], base: Shape, rounds: int, seed: int, table: Table
) -> list[Point]:
    """`base` with one size varied."""
    points = []
    for value in values:
        shape = replace(base, **{FIELDS[letter]: value})
        point = scaling_point(shape, value, rounds, seed)
        table.row(
            f"scaling with {letter}",
            f"{letter} = {value}",
            forward_ms=1e3 * point.forward,
            train_ms=1e3 * point.train,
            train_of_gemm=point.gemm / point.train,
            train_us_a_row=1e6 * point.train / shape.rows,
            forward_MB=point.forward_bytes / 1e6,
            train_MB=point.train_bytes / 1e6,
        )
        points.append(point)
    return points


def curve_slopes(letter: str, points: Sequence[Point], base: Shape) -> list[Measurement]:
    """Exponents of time and temporary bytes in the varied size."""
    sizes = [point.value for point in points]
    where = f"{letter} = {sizes[0]} … {sizes[-1]}, the others of {base}"
    curves = {
        "time": [point.train for point in points],
        "bytes": [float(point.train_bytes) for point in points],
        "forward_time": [point.forward for point in points],
    }
    return [
        Measurement(f"slope_{name}_{letter}", slope(sizes, curve), "log-log slope", where)
        for name, curve in curves.items()
    ]


def bandwidth_call(megabytes: int) -> Call:
    """Reads an array once: the sum of all its numbers. `flops` counts the bytes."""
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
    """Seconds of decoding steps, and of reading the used experts' matrices and all of them."""

    base: Shape
    tokens: list[int]
    seconds: list[float]
    used: list[float]
    every: float


def decode(
    base: Shape, tokens: Sequence[int], rounds: int, megabytes: int, seed: int, table: Table
) -> Decode:
    """Times T = 1, 2, … in rounds with the reading of a large array, which also empties caches."""
    inputs = make_inputs(replace(base, tokens=max(tokens)), seed)
    calls = [decode_call(base, inputs, count) for count in tokens]
    times = paired_rounds(
        [bandwidth_call(megabytes), *calls], rounds, f"decoding, E={base.experts}"
    )
    bandwidth = times.rate("read") or 1.0
    every = base.experts * base.expert_bytes / bandwidth
    seconds, used = [], []
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


def model_shape(name: str, most_flops: float, most_tokens: int) -> Shape:
    """A model's E and K with its widths divided by 8 (by 16 where the matrices of a layer would
    take more than 256 MB), and the most tokens, a power of two, within `most_flops` forward."""
    width, hidden, experts, per_token = MODELS[name]
    one = Shape(1, width // 8, hidden // 8, experts, per_token)
    if experts * one.expert_bytes > 256e6:
        one = replace(one, width=width // 16, hidden=hidden // 16)
    tokens = 1 << (int(most_flops / one.flops).bit_length() - 1)
    return replace(one, tokens=min(most_tokens, tokens))


def model_table(
    shapes: dict[str, Shape], rounds: int, seed: int, table: Table
) -> tuple[dict[str, dict[str, float | None]], list[Measurement]]:
    """The limit, ours and the peers: (train rates by model and implementation, measurements)."""
    rates, found = {}, []
    for model, shape in shapes.items():
        inputs = make_inputs(shape, seed)
        ours = layer_calls(shape, inputs, "xla") + layer_calls(shape, inputs, "reference")
        peers, _ = transformers_calls(shape, inputs)
        times = paired_rounds([gemm_call(shape, seed), *ours, *peers], rounds, model)
        for name in BESIDE:
            table.layer(f"{model}, {shape}", name, times)
        rates[model] = {name: times.rate_of(f"{name} train") for name in BESIDE}
        found += model_measurements(f"{model}, {shape}", times)
    return rates, found


def model_measurements(label: str, times: Times) -> list[Measurement]:
    """Forward and backward beside the limit and beside the best peer."""
    of, peer = times.rate_of("xla train"), fastest_peer(times, "train")
    over, model = times.speedup("xla train", peer), label.partition(",")[0]
    return [
        Measurement(f"train_of_gemm.{model}", of, "of the GEMM's rate", label, of),
        Measurement(f"train_over_transformers.{model}", over, "times as fast", peer, over),
    ]
