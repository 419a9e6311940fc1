"""Triton: the backward pass. Rows, blocks and offsets are as in kernel.py.

The forward pass kept x, z and the routing (arXiv:2512.14080). The second product's output is not
needed: the gate weight's gradient is the row sum of dA' · A, where dA' is the activation's gradient
before it is weighted, and A is recomputed from z.
"""

import triton
import triton.language as tl

from moe_kernels.experts.tile import fetch, locate, narrow, product


@triton.jit
def hidden_gradient_kernel(d_out, down, z, weights, assignment, block_expert, starts, counts,
                           dz, weighted, partial,
                           S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
                           R: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
                           PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                           BK: tl.constexpr, GROUP: tl.constexpr,
                           KEEP_ROWS: tl.constexpr, KEEP_MATRIX: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """With dA'[r] = d_out[token of r] down[e]^T, A from z, and s the gate weight of r:

    partial[tile, r] = rowsum(dA' · A) over one tile's columns, weighted[r] = s A,
    dz[r] = gradient of swiglu at z for s dA'.
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
            a = d_out + token[:, None] * D + k[None, :]
            # down is [E, F, D] and is read transposed: D is the contraction, and contiguous.
            b = down + expert.to(tl.int64) * F * D + k[:, None] + n[None, :] * D
            acc = tl.zeros((BM, BN), tl.float32)
            for step in range(0, tl.cdiv(D, BK)):
                left = k < D - step * BK
                part = fetch(a, real[:, None] & left[None, :], KEEP_ROWS)
                wide = left[:, None] & inside[None, :]
                right = fetch(b, wide, KEEP_MATRIX)
                acc = product(part, right, acc, PRECISION, UPCAST)
                a += BK
                b += BK
            # The assignment's number indexes weights [T, K]. s = 0 makes padding's outputs zeros.
            s = tl.load(weights + chosen, mask=real, other=0.0).to(tl.float32)[:, None]
            # Half of the columns at a time: z, dz and A of all columns beside the accumulator
            # would not fit into registers.
            pair = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            low, high = tl.split(pair)
            n = column * BN + tl.arange(0, BN // 2)
            total = activation_gradient(
                low, s, z, dz, weighted, rows, n=n, F=F, UPCAST=UPCAST)  # fmt: skip
            total += activation_gradient(
                high, s, z, dz, weighted, rows, n=n + BN // 2, F=F, UPCAST=UPCAST)  # fmt: skip
            # A row of `partial` for each column tile, summed afterwards in a fixed order: adding
            # into one row would need atomics.
            tl.store(partial + column.to(tl.int64) * R + rows, total)


@triton.jit
def activation_gradient(d_hidden, s, z, dz, weighted, rows, n, F: tl.constexpr,
                        UPCAST: tl.constexpr):  # fmt: skip
    """rowsum(dA' · A) over the columns n. Writes s A and dz there. d_hidden is dA' [rows, n]."""
    inside = (n < F)[None, :]
    row = rows.to(tl.int64)[:, None]
    at = row * (2 * F) + n[None, :]
    # Columns beyond F read zeros, so that they add nothing to the row sums.
    gate = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z + at + F, mask=inside, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    silu = gate * slope
    hidden = silu * up
    tl.store(weighted + row * F + n[None, :], narrow(s * hidden, weighted, UPCAST), mask=inside)
    scaled = s * d_hidden
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    d_gate = scaled * up * (slope + silu * (1 - slope))
    tl.store(dz + at, narrow(d_gate, dz, UPCAST), mask=inside)
    tl.store(dz + at + F, narrow(scaled * silu, dz, UPCAST), mask=inside)
    return tl.sum(d_hidden * hidden, axis=1)


@triton.jit
def matrix_gradient_kernel(left_rows, right_rows, assignment, starts, counts, out,
                           S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                           GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
                           TILES_M: tl.constexpr, TILES_N: tl.constexpr, BM: tl.constexpr,
                           BN: tl.constexpr, BK: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out[e] = sum over e's rows of left[r]^T right[r]. A gathered side has a row per token.

    BM x BN is a tile of the matrix here, and BK counts rows of the expert. An expert without rows
    gets zeros: its loop has no turns, and its tiles are stored all the same. One program adds all
    rows of a tile in order, so the bits are the same every time.
    """
    expert = tl.program_id(0) // (TILES_M * TILES_N)
    tile = tl.program_id(0) % (TILES_M * TILES_N)
    m = tile // TILES_N * BM + tl.arange(0, BM)
    n = tile % TILES_N * BN + tl.arange(0, BN)
    first = tl.load(starts + expert)
    count = tl.load(counts + expert)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(count, BK)):
        within = step * BK + tl.arange(0, BK)
        own = within < count  # an expert's own rows: the padding behind them is not read
        row = (first + within).to(tl.int64)
        # The address of a gathered row is itself loaded, which Triton does not pipeline over steps:
        # 3 and 4 stages compile to the same two buffers.
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(assignment + row, mask=own, other=0) // K).to(tl.int64)
        else:
            token = row
        left_row = token if GATHER_LEFT else row
        right_row = token if GATHER_RIGHT else row
        # left is read as its transpose, [BM, BK].
        a = tl.load(left_rows + left_row[None, :] * M + m[:, None],
                    mask=own[None, :] & (m < M)[:, None], other=0.0)  # fmt: skip
        b = tl.load(right_rows + right_row[:, None] * N + n[None, :],
                    mask=own[:, None] & (n < N)[None, :], other=0.0)  # fmt: skip
        acc = product(a, b, acc, PRECISION, UPCAST)
    at = out + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(at, narrow(acc, out, UPCAST), mask=(m < M)[:, None] & (n < N)[None, :])
