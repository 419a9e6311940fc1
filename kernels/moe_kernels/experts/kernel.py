"""Triton: grouped products over blocks of rows that belong to one expert each.

A block has BM rows of the padded, expert-sorted order (R rows). Row r holds assignment t·K + k, or
S where it is padding. Offsets of rows are 64-bit: R times a width passes 2^31 at real sizes. Sizes
are constants, so that the compiler knows which masks are whole for 16 bytes at a time.
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile, block_expert, starts, counts, TILES: tl.constexpr, BM: tl.constexpr,
           GROUP: tl.constexpr):  # fmt: skip
    """(expert, block, column tile, whether the block has rows) of a linear tile number.

    Tiles of up to GROUP blocks of one expert are neighbours, column after column, so that they
    share the expert's matrix and their rows in L2; a group never crosses an expert.
    """
    block = tile // TILES
    expert = tl.load(block_expert + block)
    first = tl.load(starts + expert) // BM
    blocks = tl.cdiv(tl.load(counts + expert), BM)
    used = block - first < blocks
    group = first + (block - first) // GROUP * GROUP
    size = tl.minimum(GROUP, tl.maximum(first + blocks - group, 1))
    within = tile - group * TILES
    return expert, tl.where(used, group + within % size, block), within // size, used


@triton.jit
def fetch(pointer, mask, KEEP: tl.constexpr):
    """Numbers under the mask, zeros elsewhere; KEEP says how long L2 is to keep them."""
    return tl.load(pointer, mask, 0.0, eviction_policy=KEEP)  # pyright: ignore


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b. UPCAST: the interpreter multiplies bfloat16's bits as integers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, pointer, UPCAST: tl.constexpr):
    """A float32 value in the dtype of what it is stored to, rounded to nearest even. UPCAST: the
    interpreter cuts the bits off, so they are rounded here."""
    if UPCAST:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def sigmoid(value, FAST: tl.constexpr):
    """1 / (1 + exp(-value)). FAST: (1 + tanh(value / 2)) / 2 by the hardware's approximate tanh,
    one instruction of the special functions' unit and not two; its error is 2^-11, so it is for
    results in 16 bits. Inline PTX, which the interpreter does not run."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * value], tl.float32, True, 1)  # fmt: skip
        return tanh * 0.5 + 0.5  # pyright: ignore[reportOperatorIssue]
    return tl.sigmoid(value)


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
            tile, block_expert, starts, counts, TILES, BM, GROUP)  # fmt: skip
        if used:
            rows = block * BM + tl.arange(0, BM)
            chosen = tl.load(assignment + rows)
            real = chosen < S
            token = tl.where(real, chosen // K, 0).to(tl.int64)
            n = column * BN + tl.arange(0, BN)
            inside = n < F
            k = tl.arange(0, BK)
            a = x + token[:, None] * D + k[None, :]
            b = gate_up + expert.to(tl.int64) * D * 2 * F + k[:, None] * (2 * F) + n[None, :]
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for step in range(0, tl.cdiv(D, BK)):
                left = k < D - step * BK
                part = fetch(a, real[:, None] & left[None, :], KEEP_ROWS)
                wide = left[:, None] & inside[None, :]
                first = fetch(b, wide, KEEP_MATRIX)
                second = fetch(b + F, wide, KEEP_MATRIX)
                gate = product(part, first, gate, PRECISION, UPCAST)
                up = product(part, second, up, PRECISION, UPCAST)
                a += BK
                b += BK * 2 * F
            row = rows.to(tl.int64)[:, None]
            if SAVE:
                at = z + row * (2 * F) + n[None, :]
                tl.store(at, narrow(gate, z, UPCAST), mask=inside[None, :])
                tl.store(at + F, narrow(up, z, UPCAST), mask=inside[None, :])
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
    """out[r] = a_rows[r] M[e], M = matrix[e] or, by its strides, matrix[e] transposed. GATHER:
    a_rows[token of r], zeros where r is padding."""
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES, BM, GROUP)  # fmt: skip
        if used:
            rows = block * BM + tl.arange(0, BM)
            row = rows.to(tl.int64)[:, None]
            if GATHER:
                chosen = tl.load(assignment + rows)
                real = (chosen < S)[:, None]
                source = tl.where(real, (chosen // K)[:, None], 0).to(tl.int64)
            else:
                real = tl.full((BM, 1), True, tl.int1)
                source = row
            n = column * BN + tl.arange(0, BN)
            inside = n < N
            k = tl.arange(0, BK)
            a = a_rows + source * KD + k[None, :]
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
def hidden_gradient_kernel(d_out, down, z, weights, assignment, block_expert, starts, counts,
                           dz, weighted, partial,
                           S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
                           R: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr,
                           PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                           BK: tl.constexpr, GROUP: tl.constexpr,
                           KEEP_ROWS: tl.constexpr, KEEP_MATRIX: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """With dA'[r] = d_out[token] down[e]^T and A recomputed from z, of one tile of columns:

    partial[tile, r] = rowsum(dA' · A), weighted[r] = s A, dz[r] = swiglu's pull-back of s dA'.
    """
    for tile in range(tl.program_id(0), BLOCKS * TILES, PROGRAMS):
        expert, block, column, used = locate(
            tile, block_expert, starts, counts, TILES, BM, GROUP)  # fmt: skip
        if used:
            rows = block * BM + tl.arange(0, BM)
            chosen = tl.load(assignment + rows)
            real = chosen < S
            token = tl.where(real, chosen // K, 0).to(tl.int64)
            n = column * BN + tl.arange(0, BN)
            inside = n < F
            k = tl.arange(0, BK)
            a = d_out + token[:, None] * D + k[None, :]
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
            s = tl.load(weights + chosen, mask=real, other=0.0).to(tl.float32)[:, None]
            row = rows.to(tl.int64)[:, None]
            at = z + row * (2 * F) + n[None, :]
            gate = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
            up = tl.load(at + F, mask=inside[None, :], other=0.0).to(tl.float32)
            slope = tl.sigmoid(gate)
            silu = gate * slope
            tl.store(partial + column.to(tl.int64) * R + rows, tl.sum(acc * silu * up, axis=1))
            tl.store(weighted + row * F + n[None, :],
                     narrow(s * silu * up, weighted, UPCAST), mask=inside[None, :])  # fmt: skip
            acc = s * acc
            at = dz + row * (2 * F) + n[None, :]
            d_gate = acc * up * (slope + silu * (1 - slope))
            tl.store(at, narrow(d_gate, dz, UPCAST), mask=inside[None, :])
            tl.store(at + F, narrow(acc * silu, dz, UPCAST), mask=inside[None, :])


@triton.jit
def matrix_gradient_kernel(left_rows, right_rows, assignment, starts, counts, out,
                           S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                           GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
                           TILES_M: tl.constexpr, TILES_N: tl.constexpr, BM: tl.constexpr,
                           BN: tl.constexpr, BK: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out[e] = sum over e's rows of left[r]^T right[r]; a side that is gathered is per token.

    An expert without rows gets zeros. One program a tile, rows in order: the same bits every time.
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
        own = within < count
        row = (first + within).to(tl.int64)
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(assignment + row, mask=own, other=0) // K).to(tl.int64)
        else:
            token = row
        left_row = token if GATHER_LEFT else row
        right_row = token if GATHER_RIGHT else row
        a = tl.load(left_rows + left_row[None, :] * M + m[:, None],
                    mask=own[None, :] & (m < M)[:, None], other=0.0)  # fmt: skip
        b = tl.load(right_rows + right_row[:, None] * N + n[None, :],
                    mask=own[:, None] & (n < N)[None, :], other=0.0)  # fmt: skip
        acc = product(a, b, acc, PRECISION, UPCAST)
    at = out + expert.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(at, narrow(acc, out, UPCAST), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def combine_kernel(rows, row, weights, out,
                   R: tl.constexpr, D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
                   BD: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out[t] = sum_k w[t, k] · rows[row[t, k]] in float32, k after k; dropped ones (R) left out."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BD,), tl.float32)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(row + token * K + k)
        width = tl.where(at < R, D, 0)
        part = tl.load(rows + at.to(tl.int64) * D + d, mask=d < width, other=0.0)
        part = part.to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * K + k).to(tl.float32)
        acc += part
    tl.store(out + token * D + d, narrow(acc, out, UPCAST), mask=d < D)
