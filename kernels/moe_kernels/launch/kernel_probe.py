"""Triton: the least kernel that uses the matrix units."""

import triton
import triton.language as tl


@triton.jit
def probe_kernel(a, b, out, N: tl.constexpr):
    """out = a b for matrices of N rows and columns, by one program."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))
