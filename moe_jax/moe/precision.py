"""What the operands of the experts' forward products are rounded to: nothing, or FP8 emulated."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jax import Array
from moe_kernels.quantise.reference import round_matrices, round_rows


class Rounding(NamedTuple):
    """Of activations and of matrices, to one dtype. Gradients are straight-through."""

    rows: Callable[[Array], Array]
    """[..., D] -> what stands for it."""
    matrices: Callable[[Array, int], Array]
    """([E, D, N], how many matrices lie side by side in N) -> what stands for it."""


def _fp8_rows(rows: Array, power_of_two: bool) -> Array:
    return round_rows(rows.reshape(-1, rows.shape[-1]), power_of_two).reshape(rows.shape)


def _fp8_matrices(matrices: Array, parts: int, power_of_two: bool) -> Array:
    return round_matrices(matrices, parts, power_of_two)


def _fp8(power_of_two: bool) -> Rounding:
    return Rounding(
        partial(_fp8_rows, power_of_two=power_of_two),
        partial(_fp8_matrices, power_of_two=power_of_two),
    )


NONE = Rounding(lambda rows: rows, lambda matrices, parts: matrices)
FP8 = {"float32": _fp8(False), "power_of_two": _fp8(True)}
"""By `model.moe.fp8_scales`: to the numbers that FP8 kernels multiply (E4M3 in tiles of 1x128 and
128x128), in float32, where products of two E4M3 values are exact. Numerics to study, not speed."""
