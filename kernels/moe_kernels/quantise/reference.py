"""The specification in plain jnp: numbers on E4M3's grid, and the scales of their tiles."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

TILE = 128
"""Numbers along the contraction, and columns of a matrix, that share a scale."""
LARGEST = 448.0
"""E4M3's largest number. It has no infinity."""
SMALLEST_MAXIMUM = 1e-4
"""A tile's largest magnitude counts as at least this, so that a tile of zeros has a scale."""
E4M3 = jnp.float8_e4m3fn


class Quantised(NamedTuple):
    """Numbers as values times the scale of their tile. The layout is that of quantise_rows or of
    quantise_matrices."""

    values: Float[Array, "..."]
    """float8_e4m3fn."""
    scales: Float[Array, "..."]
    """float32."""


def round_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 values rounded to E4M3's grid, ties to even. Beyond 448 is 448, NaN stays NaN."""
    # reduce_precision and not a conversion to FP8 and back: XLA may drop such a pair
    # (xla_allow_excess_precision), and the rounding with it. It never drops reduce_precision.
    normal = jnp.clip(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3), -LARGEST, LARGEST)
    # Below 2^-6 the numbers are subnormal: the grid's step stays 2^-9.
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 2.0**9) * 2.0**-9, normal)


def tile_scale(
    largest: Float[Array, "..."], power_of_two: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(scale, its inverse) of tiles with these largest magnitudes m, in float32.

    scale = max(m, 1e-4) / 448, or the next power of two (arXiv:2412.19437, §3.3).
    """
    largest = jnp.maximum(largest, SMALLEST_MAXIMUM)
    # A product with float32's 1/448: XLA makes one of the division, and the kernel must have the
    # same bits.
    scale = largest * jnp.float32(1 / LARGEST)
    if not power_of_two:
        return scale, LARGEST / largest
    # A mantissa that is not zero carries into the exponent: a ceiling. The inverse of 2^(e - 127)
    # has the biased exponent 254 - e.
    exponent = (lax.bitcast_convert_type(scale, jnp.int32) + 0x7FFFFF) >> 23
    scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    inverse = lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
    return scale, inverse


def scale_rows(
    x: Float[Array, "R D"], power_of_two: bool = False
) -> tuple[Float[Array, "R D"], Float[Array, "R tiles"]]:
    """(numbers on the grid, in float32, scales): quantise_rows before the change of dtype."""
    padded = _padded(x, 1)
    tiles = padded.reshape(len(x), padded.shape[1] // TILE, TILE)
    values, scales = _scaled(tiles, (2,), power_of_two)
    return values.reshape(padded.shape)[:, : x.shape[1]], scales[:, :, 0]


def scale_matrices(
    w: Float[Array, "E D N"], parts: int = 1, power_of_two: bool = False
) -> tuple[Float[Array, "E D N"], Float[Array, "E parts n_tiles d_tiles"]]:
    """(numbers on the grid, in float32 and in w's layout, scales of quantise_matrices)."""
    experts, depth, columns = w.shape
    each = columns // parts
    split = _padded(_padded(w.reshape(experts, depth, parts, each), 1), 3)
    # [E, d_tiles, 128, parts, n_tiles, 128]: a block is axes 2 and 5.
    tiles = split.reshape(experts, -(-depth // TILE), TILE, parts, -(-each // TILE), TILE)
    values, scales = _scaled(tiles, (2, 5), power_of_two)
    values = values.reshape(split.shape)[:, :depth, :, :each].reshape(w.shape)
    return values, scales[:, :, 0, :, :, 0].transpose(0, 2, 3, 1)


def quantise_rows(x: Float[Array, "R D"], power_of_two: bool = False) -> Quantised:
    """The specification of api.quantise_rows."""
    values, scales = scale_rows(x, power_of_two)
    return Quantised(values.astype(E4M3), scales)


def quantise_matrices(
    w: Float[Array, "E D N"], parts: int = 1, power_of_two: bool = False
) -> Quantised:
    """The specification of api.quantise_matrices."""
    values, scales = scale_matrices(w, parts, power_of_two)
    return Quantised(values.mT.astype(E4M3), scales)


def round_rows(x: Float[Array, "R D"], power_of_two: bool = False) -> Float[Array, "R D"]:
    """values · scales of quantise_rows, in float32 and in x's layout."""
    values, scales = scale_rows(x, power_of_two)
    return values * jnp.repeat(scales, TILE, axis=1)[:, : x.shape[1]]


def round_matrices(
    w: Float[Array, "E D N"], parts: int = 1, power_of_two: bool = False
) -> Float[Array, "E D N"]:
    """values · scales of quantise_matrices, in float32 and in w's layout."""
    values, scales = scale_matrices(w, parts, power_of_two)
    # A scale for every number, [E, parts, F, D], then [E, N, D] as the transposed matrices are.
    repeated = jnp.repeat(jnp.repeat(scales, TILE, axis=2), TILE, axis=3)
    repeated = repeated[:, :, : w.shape[2] // parts, : w.shape[1]].reshape(len(w), -1, w.shape[1])
    return values * repeated.mT


def calc_diff(x: Array, y: Array) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64, DeepGEMM's measure of an error.

    It is 0 where x = y, and half the squared relative error where they are near.
    """
    a = np.asarray(x, np.float64)
    b = np.asarray(y, np.float64)
    total = np.sum(a * a) + np.sum(b * b)
    return float(1 - 2 * np.sum(a * b) / total) if total else 0.0


def _padded(x: Array, axis: int) -> Array:
    """x with zeros up to a whole tile along an axis. Zeros change no tile's maximum."""
    missing = -x.shape[axis] % TILE
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def _scaled(tiles: Array, axes: tuple[int, ...], power_of_two: bool) -> tuple[Array, Array]:
    """(values on the grid, scales) of tiles that lie along `axes`.

    A number that is not finite becomes NaN and has no part in its tile's scale.
    """
    tiles = tiles.astype(jnp.float32)
    finite = jnp.isfinite(tiles)
    largest = jnp.max(jnp.where(finite, jnp.abs(tiles), 0.0), axis=axes, keepdims=True)
    scale, inverse = tile_scale(largest, power_of_two)
    return round_e4m3(jnp.where(finite, tiles * inverse, jnp.nan)), scale
