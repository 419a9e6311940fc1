"""How the layer's time and memory grow with T, E and K."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.moe_layer.timing import gemm_call, layer_calls, paired_rounds
from moe_jax.base.result import Measurement
from moe_jax.study.layer_case import Shape, make_inputs
from moe_jax.study.live_table import LiveTable

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


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of the power law y = c x^p: least squares in log-log."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def scaling_point(shape: Shape, value: int, rounds: int, seed: int) -> Point:
    """xla's layer at one size. `gemm` is the time of forward and backward at the GEMM's rate."""
    gemm = gemm_call(shape, seed)
    calls = layer_calls(shape, make_inputs(shape, seed), "xla")
    times = paired_rounds([gemm, *calls], rounds, f"scaling, {shape}")
    forward, train = (times.median(call.name) or 0.0 for call in calls)
    ideal = 3 * shape.flops / (times.rate("gemm") or 1.0)
    return Point(value, forward, train, ideal, calls[0].temporary or 0, calls[1].temporary or 0)


def scaling_curve(
    letter: str, values: Sequence[int], base: Shape, rounds: int, seed: int, table: LiveTable
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
