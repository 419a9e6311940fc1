"""Triton: one row times its expert's matrix, for so few tokens that blocks would be empty."""

import triton
import triton.language as tl

from moe_kernels.experts.tile import narrow


@triton.jit
def decode_kernel(vectors, matrix, experts, out,
                  E: tl.constexpr, KD: tl.constexpr, N: tl.constexpr, PER: tl.constexpr,
                  SWIGLU: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  STAGES: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """out[s] = vectors[s // PER] matrix[experts[s]]. Rows of expert E are left unwritten.

    SWIGLU: matrix is [E, KD, 2N], and silu(first half) · second half is written.

    One program a tile of columns of one assignment. The matrix is read once and each number is used
    once, so memory sets the time. The products are plain float32 multiplications: matrix units take
    16 rows, of which 15 would be empty.
    """
    s = tl.program_id(0) // TILES
    expert = tl.load(experts + s)
    if expert < E:
        width = 2 * N if SWIGLU else N
        n = tl.program_id(0) % TILES * BN + tl.arange(0, BN)
        inside = n < N
        k = tl.arange(0, BK)
        a = vectors + (s // PER).to(tl.int64) * KD + k
        b = matrix + expert.to(tl.int64) * KD * width + k[:, None] * width + n[None, :]
        # A sum for each place of a [BK, BN] step, reduced once after the loop: a reduction in each
        # step would wait for other lanes.
        acc = tl.zeros((BK, BN), tl.float32)
        other = tl.zeros((BK, BN), tl.float32)
        # Stages are given here, because Triton otherwise pipelines only loads that feed tl.dot.
        for step in tl.range(0, tl.cdiv(KD, BK), num_stages=STAGES):  # pyright: ignore
            left = k < KD - step * BK
            part = tl.load(a, mask=left, other=0.0).to(tl.float32)[:, None]
            wide = left[:, None] & inside[None, :]
            acc += part * tl.load(b, mask=wide, other=0.0).to(tl.float32)
            if SWIGLU:
                other += part * tl.load(b + N, mask=wide, other=0.0).to(tl.float32)
            a += BK
            b += BK * width
        total = tl.sum(acc, axis=0)
        if SWIGLU:
            total = total * tl.sigmoid(total) * tl.sum(other, axis=0)
        at = out + s.to(tl.int64) * N + n
        tl.store(at, narrow(total, out, UPCAST), mask=inside)
