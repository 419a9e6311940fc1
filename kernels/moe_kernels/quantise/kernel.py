"""Triton: FP8 values and their scales. A tile is read once and stays in registers between its
maximum and its rounding.

All arithmetic is chosen so that the bits are the reference's: the same product for a scale, a
correctly rounded division for its inverse.
"""

import triton
import triton.language as tl


@triton.jit
def tile_scale(largest, POWER_OF_TWO: tl.constexpr):
    """(scale, its inverse) of tiles with these largest magnitudes, as reference.tile_scale."""
    largest = tl.maximum(largest, 1e-4)
    scale = largest * (1 / 448)  # a product, because XLA makes one of the reference's division
    if POWER_OF_TWO:
        # Adding all ones to the mantissa carries into the exponent unless it was zero: a ceiling.
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        # 2^-(e - 127) has the biased exponent 254 - e, so the inverse is exact.
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        inverse = tl.div_rn(448.0, largest)  # `/` may be the approximate div.full on a GPU
    return scale, inverse


@triton.jit
def round_to_e4m3(value, UPCAST: tl.constexpr):
    """float32 to E4M3, ties to even. Beyond 448 becomes 448, and NaN stays NaN.

    UPCAST: in the interpreter, whose conversion rounds ties away, loses carries and has no NaN.
    There the bits are computed here.
    """
    if UPCAST:
        bits = value.to(tl.int32, bitcast=True)
        size = tl.abs(value)
        # E4M3 keeps 3 of float32's 23 mantissa bits: round at bit 20, half to even. Its exponent
        # bias is 7 and float32's 127, so 120 is taken off above the mantissa. 0x7E is 448.
        normal = (bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)
        normal = tl.minimum((normal >> 20) - (120 << 3), 0x7E)
        # Below 2^-6 E4M3's step is 2^-9. float32's step at 2^14 is 2^-9 as well, so the addition
        # rounds to it, and the lowest bits of the sum are the code.
        small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(size < 0.015625, small, normal)
        code = tl.where(value == value, code, 0x7F) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return value.to(tl.float8e4nv)


@triton.jit
def quantise_tile(tile, axis, POWER_OF_TWO: tl.constexpr, UPCAST: tl.constexpr):
    """(E4M3 values, scales) of a float32 tile: one scale along `axis`, or one for all (None).

    A number that is not finite becomes NaN and has no part in the scale. No value exceeds 448 but
    by rounding, so nothing is clipped here.
    """
    finite = tl.abs(tile) < float("inf")  # false for NaN as well
    largest = tl.max(tl.where(finite, tl.abs(tile), 0.0), axis=axis)
    scale, inverse = tile_scale(largest, POWER_OF_TWO)
    if axis == 1:
        inverse = inverse[:, None]
    return round_to_e4m3(tl.where(finite, tile * inverse, float("nan")), UPCAST), scale


@triton.jit
def quantise_rows_kernel(x, values, scales,
                         R: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
                         ROWS: tl.constexpr, TILE: tl.constexpr, POWER_OF_TWO: tl.constexpr,
                         UPCAST: tl.constexpr):  # fmt: skip
    """values[r, d] and scales[r, d / TILE]: ROWS rows of one tile's columns a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    inside = (row < R)[:, None] & (d < D)[None, :]
    # Zeros beyond the last column leave a tile's maximum as it is.
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    quantised, scale = quantise_tile(tile, 1, POWER_OF_TWO, UPCAST)
    tl.store(values + at, quantised, mask=inside)
    tl.store(scales + row.to(tl.int64) * TILES + tl.program_id(1), scale, mask=row < R)


@triton.jit
def quantise_matrices_kernel(w, values, scales,
                             D: tl.constexpr, F: tl.constexpr, PARTS: tl.constexpr,
                             TILES_D: tl.constexpr, TILES_F: tl.constexpr, TILE: tl.constexpr,
                             POWER_OF_TWO: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """values[e, part, f, d] from w[e, d, part, f], and scales[e, part, f / TILE, d / TILE].

    One program a block of TILE x TILE. `matrix` numbers the pairs of expert and part.
    """
    # A grid's second axis ends at 65,535, its first at 2^31: matrices times blocks go first.
    matrix = tl.program_id(0) // TILES_D
    tile_d = tl.program_id(0) % TILES_D
    d = tile_d * TILE + tl.arange(0, TILE)
    f = tl.program_id(1) * TILE + tl.arange(0, TILE)
    expert = (matrix // PARTS).to(tl.int64)
    at = expert * D * PARTS * F + d[:, None] * (PARTS * F) + (matrix % PARTS) * F + f[None, :]
    tile = tl.load(w + at, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0).to(tl.float32)
    quantised, scale = quantise_tile(tile, None, POWER_OF_TWO, UPCAST)
    # The tile is transposed on chip, after rounding to a byte a number, so that both the load
    # (along f) and the store (along d) touch neighbouring addresses.
    at = matrix.to(tl.int64) * F * D + f[:, None] * D + d[None, :]
    tl.store(values + at, tl.trans(quantised), mask=(f < F)[:, None] & (d < D)[None, :])
    # One scale for 16,384 numbers: 32-bit offsets suffice.
    tl.store(scales + (matrix * TILES_F + tl.program_id(1)) * TILES_D + tile_d, scale)
