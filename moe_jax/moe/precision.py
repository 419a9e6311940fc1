"""Rounding of the operands of the experts' forward products: none, or emulated FP8."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from moe_kernels.quantise.reference import round_matrices, round_rows


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over numbers of this dtype: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Rounding(NamedTuple):
    """Functions that round activations and matrices. Gradients are straight-through."""

    rows: Callable[[Array], Array]
    """[..., D] -> the rounded values, in the same shape."""
    matrices: Callable[[Array, int], Array]
    """([E, D, N], number of matrices side by side in N) -> the rounded values. A tile with
    its scale never spans two matrices."""


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
"""By `model.moe.fp8_scales`: rounds to the numbers that FP8 kernels multiply.

These are E4M3 in tiles of 1x128 and 128x128. Products are taken in float32, where the product of
two E4M3 values is exact. So this shows the numerics of FP8, and not its speed."""
