"""Triton: the experts' forward products on FP8 operands.

Rows, masks and the loop over tiles are as in experts/kernel.py.

A step is one tile of 128 along the contraction. Its product starts from zero, is multiplied by the
two operands' scales, and is added in float32 on the plain cores. Hopper's matrix units keep about
14 bits of a sum of E4M3 products, so no sum stays there for longer (arXiv:2412.19437, §3.3.2).

The matrices are [E, N, D], with the contraction last: FP8 matrix units take no other layout.
Scales of rows are [R, steps], those of matrices [E, column tiles, steps]. Scales are few, so their
offsets fit 32 bits but where a row number is in them.
"""

import triton
import triton.language as tl

from moe_kernels.experts.tile import locate, narrow
from moe_kernels.quantise.kernel import quantise_tile


@triton.jit
def operand(value, UPCAST: tl.constexpr):
    """E4M3 as it is. UPCAST: in float32 by its bits, because the interpreter reads NaN as 480."""
    if UPCAST:
        bits = value.to(tl.uint8, bitcast=True).to(tl.int32)
        # E4M3's exponent and mantissa, put where float32's are, are 2^(127 - 7) = 2^120 too small.
        # The product with 2^120 is exact for subnormal numbers as well.
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        return tl.where(bits > 0x7F, -size, size)
    return value


@triton.jit
def scaled_product(a, b, scale, UPCAST: tl.constexpr):
    """scale · (a b) in float32, of one tile along the contraction."""
    return tl.dot(operand(a, UPCAST), operand(b, UPCAST), input_precision="ieee") * scale


@triton.jit
def fp8_up_kernel(x, x_scales, gate_up, gate_up_scales, assignment, block_expert, starts, counts,
                  z, hidden, hidden_scales,
                  S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
                  TILES: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                  SAVE: tl.constexpr, POWER_OF_TWO: tl.constexpr, UPCAST: tl.constexpr,
                  ROUND: tl.constexpr):  # fmt: skip
    """z[r] = x[token of r] gate_up[e]; hidden[r] = e4m3(silu(z's first half) · its second half).

    gate_up is [E, 2F, D], its scales [E, 2, F / BN, D / BK]. BN = 128, so a program's columns are
    one tile of the second product's operand, and their maximum needs no other program.
    """
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            rows = block * BM + tl.arange(0, BM)
            chosen = tl.load(assignment + rows)
            real = chosen < S
            token = tl.where(real, chosen // K, 0).to(tl.int64)
            n = column * BN + tl.arange(0, BN)
            inside = n < F
            k = tl.arange(0, BK)
            steps = tl.cdiv(D, BK)
            a = x + token[:, None] * D + k[None, :]
            # [BK, BN] of the transposed matrix: neighbours along k are neighbours in memory.
            b = gate_up + expert.to(tl.int64) * 2 * F * D + n[None, :] * D + k[:, None]
            a_scale = x_scales + token * steps
            b_scale = gate_up_scales + (expert * 2 * TILES + column) * steps
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for step in range(0, steps):
                left = k < D - step * BK
                part = tl.load(a, mask=real[:, None] & left[None, :], other=0.0)
                both = left[:, None] & inside[None, :]
                s = tl.load(a_scale, mask=real, other=0.0)
                s_gate = (s * tl.load(b_scale))[:, None]
                s_up = (s * tl.load(b_scale + TILES * steps))[:, None]
                # Not tl.dot(acc=): the partial product is scaled before it is added.
                gate += scaled_product(part, tl.load(b, mask=both, other=0.0), s_gate, UPCAST)
                up += scaled_product(part, tl.load(b + F * D, mask=both, other=0.0), s_up, UPCAST)
                a += BK
                b += BK
                a_scale += 1
                b_scale += 1
            row = rows.to(tl.int64)[:, None]
            if SAVE:
                at = z + row * (2 * F) + n[None, :]
                tl.store(at, narrow(gate, z, ROUND), mask=inside[None, :])
                tl.store(at + F, narrow(up, z, ROUND), mask=inside[None, :])
            # Columns beyond F are zeros and leave the maxima as they are.
            values, scale = quantise_tile(gate * tl.sigmoid(gate) * up, 1, POWER_OF_TWO, UPCAST)
            tl.store(hidden + row * F + n[None, :], values, mask=inside[None, :])
            tl.store(hidden_scales + rows.to(tl.int64) * TILES + column, scale)


@triton.jit
def fp8_rows_kernel(a_rows, a_scales, matrix, matrix_scales, block_expert, starts, counts, out,
                    KD: tl.constexpr, N: tl.constexpr,
                    TILES: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                    UPCAST: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """out[r] = a_rows[r] M[e]. `matrix` holds M's transpose, [E, N, KD].

    Padding needs no mask: fp8_up_kernel wrote zeros there, and the scales of zeros.
    """
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            row = (block * BM + tl.arange(0, BM)).to(tl.int64)
            n = column * BN + tl.arange(0, BN)
            inside = n < N
            k = tl.arange(0, BK)
            steps = tl.cdiv(KD, BK)
            a = a_rows + row[:, None] * KD + k[None, :]
            b = matrix + expert.to(tl.int64) * N * KD + n[None, :] * KD + k[:, None]
            a_scale = a_scales + row * steps
            b_scale = matrix_scales + (expert * TILES + column) * steps
            acc = tl.zeros((BM, BN), tl.float32)
            for step in range(0, steps):
                left = k < KD - step * BK
                part = tl.load(a, mask=left[None, :], other=0.0)
                s = (tl.load(a_scale) * tl.load(b_scale))[:, None]
                both = left[:, None] & inside[None, :]
                acc += scaled_product(part, tl.load(b, mask=both, other=0.0), s, UPCAST)
                a += BK
                b += BK
                a_scale += 1
                b_scale += 1
            tl.store(out + row[:, None] * N + n[None, :], narrow(acc, out, ROUND),
                     mask=inside[None, :])  # fmt: skip
