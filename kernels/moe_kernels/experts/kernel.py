"""Triton: the forward pass, grouped products over blocks of rows that belong to one expert each.

A block has BM rows of the padded, expert-sorted order (R rows). Row r is assignment t·K + k, or S
where it is padding. R is a multiple of BM, so rows need no mask against R. Padding is read as zeros
and written as zeros. Blocks without rows are not written at all, and nothing reads them.

Offsets of rows, tokens and experts are 64-bit: R times a width passes 2^31 at real sizes. Offsets
inside one matrix or one row fit 32 bits, and 64-bit ones would cost registers.

Sizes are constants of the compiler, which then knows where a mask is whole for 16 bytes and loads
them at once.

A kernel loops over tiles from its program's number in steps of PROGRAMS. With one program a tile
this is a single turn. Persistent programs (`Tiles.resident`) take several.
"""

import triton
import triton.language as tl

from moe_kernels.experts.tile import fetch, locate, narrow, product, sigmoid


@triton.jit
def up_kernel(x, gate_up, assignment, block_expert, starts, counts, z, hidden,
              S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
              TILES: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
              KEEP_ROWS: tl.constexpr, KEEP_MATRIX: tl.constexpr, SAVE: tl.constexpr,
              FAST_SILU: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """z[r] = x[token of r] gate_up[e], hidden[r] = silu(z's first half) · its second half.

    Both halves of a column are accumulated by the same program, so that no second kernel reads z.
    """
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            # Token numbers are loaded once a tile: the gather costs nothing in the loop below.
            rows = block * BM + tl.arange(0, BM)
            chosen = tl.load(assignment + rows)
            real = chosen < S
            token = tl.where(real, chosen // K, 0).to(tl.int64)
            n = column * BN + tl.arange(0, BN)
            inside = n < F
            k = tl.arange(0, BK)
            a = x + token[:, None] * D + k[None, :]  # [BM, BK]
            b = gate_up + expert.to(tl.int64) * D * 2 * F + k[:, None] * (2 * F) + n[None, :]
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for step in range(0, tl.cdiv(D, BK)):
                left = k < D - step * BK  # the last step may be shorter
                part = fetch(a, real[:, None] & left[None, :], KEEP_ROWS)
                wide = left[:, None] & inside[None, :]
                first = fetch(b, wide, KEEP_MATRIX)
                second = fetch(b + F, wide, KEEP_MATRIX)  # the up projection's columns
                gate = product(part, first, gate, PRECISION, UPCAST)
                up = product(part, second, up, PRECISION, UPCAST)
                a += BK
                b += BK * 2 * F
            row = rows.to(tl.int64)[:, None]
            if SAVE:
                at = z + row * (2 * F) + n[None, :]
                tl.store(at, narrow(gate, z, UPCAST), mask=inside[None, :])
                tl.store(at + F, narrow(up, z, UPCAST), mask=inside[None, :])
            # From the float32 accumulators, not from z as it was rounded for the backward pass.
            result = gate * sigmoid(gate, FAST_SILU) * up
            tl.store(hidden + row * F + n[None, :], narrow(result, hidden, UPCAST),
                     mask=inside[None, :])  # fmt: skip


@triton.jit
def rows_kernel(a_rows, matrix, assignment, block_expert, starts, counts, out,
                S: tl.constexpr, KD: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                GATHER: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_N: tl.constexpr,
                TILES: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                KEEP_ROWS: tl.constexpr, KEEP_MATRIX: tl.constexpr,
                PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out[r] = a_rows[r] M[e], with M = matrix[e] or, by its strides, matrix[e] transposed.

    GATHER: a_rows[token of r], and zeros where r is padding. KD is the depth of the contraction.
    """
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES=TILES, BM=BM, GROUP=GROUP)  # fmt: skip
        if used:
            rows = block * BM + tl.arange(0, BM)
            row = rows.to(tl.int64)[:, None]
            if GATHER:
                chosen = tl.load(assignment + rows)
                real = (chosen < S)[:, None]
                source = tl.where(real, (chosen // K)[:, None], 0).to(tl.int64)
            else:
                real = tl.full((BM, 1), True, tl.int1)  # a_rows has zeros in its padding
                source = row
            n = column * BN + tl.arange(0, BN)
            inside = n < N
            k = tl.arange(0, BK)
            a = a_rows + source * KD + k[None, :]
            # Strides are constants, so the compiler sees which axis is contiguous: one kernel for
            # M and its transpose, and no transposed copy in memory.
            b = matrix + expert.to(tl.int64) * KD * N
            b += k[:, None] * STRIDE_K + n[None, :] * STRIDE_N
            acc = tl.zeros((BM, BN), tl.float32)
            for step in range(0, tl.cdiv(KD, BK)):
                left = k < KD - step * BK
                part = fetch(a, real & left[None, :], KEEP_ROWS)
                wide = left[:, None] & inside[None, :]
                right = fetch(b, wide, KEEP_MATRIX)
                acc = product(part, right, acc, PRECISION, UPCAST)
                a += BK
                b += BK * STRIDE_K
            tl.store(out + row * N + n[None, :], narrow(acc, out, UPCAST),
                     mask=inside[None, :])  # fmt: skip


@triton.jit
def combine_kernel(rows, row, weights, out,
                   R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
                   BD: tl.constexpr, KEEP_ROWS: tl.constexpr, STORE: tl.constexpr,
                   UPCAST: tl.constexpr):  # fmt: skip
    """out[t] = sum_k w[t, k] · rows[row[t, k]] in float32. Dropped assignments (R) add nothing.

    One program a token and BD columns. It adds k after k, which replaces a scatter with atomics and
    gives the same bits every time.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    # Unrolled, so that the loads of the K rows do not wait for each other.
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(row + token * K + k)
        width = tl.where(at < R, D, 0)  # a row of no columns: the mask is false, nothing is read
        part = fetch(rows + at.to(tl.int64) * D + d, d < width, KEEP_ROWS).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * K + k).to(tl.float32)
        acc += part
    tl.store(out + token * D + d, narrow(acc, out, UPCAST), mask=d < D,
             cache_modifier=STORE)  # fmt: skip  # pyright: ignore[reportArgumentType]
