"""Triton: what the kernels over blocks of rows share. A tile is one block by BN columns."""

import triton
import triton.language as tl


@triton.jit
def locate(tile, block_expert, starts, counts, TILES: tl.constexpr, BM: tl.constexpr,
           GROUP: tl.constexpr):  # fmt: skip
    """(expert, block, column tile, whether the block has rows) of a linear tile number.

    Programs start about in the order of their numbers. Tiles of up to GROUP blocks of one expert
    are neighbours, column after column, so that those that run together share columns of the matrix
    and their rows in L2. A group never crosses an expert, whose matrix is another.
    """
    block = tile // TILES
    expert = tl.load(block_expert + block)
    first = tl.load(starts + expert) // BM
    blocks = tl.cdiv(tl.load(counts + expert), BM)
    used = block - first < blocks
    group = first + (block - first) // GROUP * GROUP
    # The last group of an expert is smaller. For an unused block the difference may be zero or
    # below, and the result is not read; the maximum keeps the division defined.
    size = tl.minimum(GROUP, tl.maximum(first + blocks - group, 1))
    within = tile - group * TILES
    return expert, tl.where(used, group + within % size, block), within // size, used


@triton.jit
def fetch(pointer, mask, EVICTION: tl.constexpr):
    """Numbers under the mask and zeros elsewhere. EVICTION says what L2 drops first or last."""
    return tl.load(pointer, mask, 0.0, eviction_policy=EVICTION)  # pyright: ignore


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b, in float32.

    UPCAST: in the interpreter, which multiplies bfloat16's bits as integers.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(value, pointer, UPCAST: tl.constexpr):
    """A float32 value in the dtype that `pointer` points to, rounded to nearest even.

    UPCAST: in the interpreter, which cuts float32's lower bits off for bfloat16.
    """
    if UPCAST:
        # Just under half of the part that is cut off, and one more where the kept part is odd.
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        value = bits.to(tl.float32, bitcast=True)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def sigmoid(value, FAST: tl.constexpr):
    """1 / (1 + exp(-value)).

    FAST: (1 + tanh(value / 2)) / 2 by the hardware's approximate tanh. That is one instruction of
    the special-function unit instead of two. Its error is 2^-11, so it is for results in 16 bits.
    It is inline PTX, which the interpreter cannot run.
    """
    if FAST:
        # The last arguments: the assembly is pure, and takes one element at a time.
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * value], tl.float32, True, 1)  # fmt: skip
        return tanh * 0.5 + 0.5  # pyright: ignore[reportOperatorIssue]
    return tl.sigmoid(value)
