"""Tiles of the grouped products by operation, size of a number and rows of a block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from moe_kernels.launch import Tuning, capability, has_small_memory

Eviction = Literal["", "evict_first", "evict_last"]


class Tiles(NamedTuple):
    """Sizes of a tile of one block's rows, and how its kernel is compiled."""

    bn: int
    """Columns of a program's tile (of each half, for the SwiGLU's)."""
    bk: int
    """Depth of a step along the contraction."""
    tuning: Tuning
    group: int = 8
    """Blocks of an expert whose tiles are neighbours in the order of programs (tile.locate)."""
    resident: int = 0
    """Persistent programs on each multiprocessor, which take tile after tile. 0 is one program a
    tile."""
    keep_rows: Eviction = ""
    """L2's eviction policy for the rows that are read."""
    keep_matrix: Eviction = ""
    """L2's eviction policy for the matrices."""
    fast_silu: bool = False
    """SwiGLU by the hardware's approximate tanh (tile.sigmoid)."""
    store: Literal["", ".cs"] = ""
    """How combine stores: ".cs" for numbers that are read late (PTX's "cache streaming")."""


# By operation, bytes of a number and rows of a block. `python -m moe_kernels.audit` prints
# registers, spills and shared memory of each entry; no entry has been timed on a GPU yet.
# - 128 rows take 8 warps: with 4, sm_90 spills.
# - `up` has two accumulators (gate and up), so half as many columns as `rows`.
# - The hidden gradient's epilogue takes half of its columns at a time. With all at once 64 columns
#   take 255 registers on sm_90, and 128 spill 3,572 bytes.
# - 16 rows have few FLOPs for each byte of the matrix, so they wait for memory. Their steps are
#   128 deep.
# - float32 tiles are small: its products run on the plain cores, not on the matrix units.
TABLE: dict[tuple[str, int, int], Tiles] = {
    ("up", 2, 16): Tiles(64, 128, Tuning(4, 4)),
    ("up", 2, 32): Tiles(64, 64, Tuning(4, 4)),
    ("up", 2, 64): Tiles(64, 64, Tuning(4, 4)),
    ("up", 2, 128): Tiles(128, 64, Tuning(8, 3)),
    ("up", 4, 16): Tiles(32, 32, Tuning(4, 3)),
    ("up", 4, 32): Tiles(32, 32, Tuning(4, 3)),
    ("up", 4, 64): Tiles(32, 32, Tuning(4, 3)),
    ("up", 4, 128): Tiles(32, 32, Tuning(8, 3)),
    ("rows", 2, 16): Tiles(64, 128, Tuning(4, 4)),
    ("rows", 2, 32): Tiles(128, 64, Tuning(4, 4)),
    ("rows", 2, 64): Tiles(128, 64, Tuning(4, 4)),
    ("rows", 2, 128): Tiles(256, 64, Tuning(8, 3)),
    ("rows", 4, 16): Tiles(64, 32, Tuning(4, 3)),
    ("rows", 4, 32): Tiles(64, 32, Tuning(4, 3)),
    ("rows", 4, 64): Tiles(64, 32, Tuning(4, 3)),
    ("rows", 4, 128): Tiles(64, 32, Tuning(8, 3)),
    ("hidden gradient", 2, 16): Tiles(64, 64, Tuning(4, 4)),
    ("hidden gradient", 2, 32): Tiles(64, 64, Tuning(4, 4)),
    ("hidden gradient", 2, 64): Tiles(64, 64, Tuning(4, 4)),
    ("hidden gradient", 2, 128): Tiles(128, 64, Tuning(8, 3)),
    ("hidden gradient", 4, 16): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 32): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 64): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 128): Tiles(32, 32, Tuning(8, 3)),
}

AMPERE: dict[tuple[str, int, int], Tiles] = {
    ("up", 2, 128): Tiles(64, 64, Tuning(8, 3)),
    ("hidden gradient", 4, 128): Tiles(64, 32, Tuning(8, 3)),
}
"""Entries that differ below compute capability 9.0. There the accumulators share registers with the
operands of mma.sync, and two accumulators of 128 columns spill. In float32 32 columns of the hidden
gradient spill 16 bytes, and 64 spill none."""

SMALL: dict[tuple[str, int, int], Tiles] = {
    ("up", 2, 16): Tiles(64, 128, Tuning(4, 3)),
    ("up", 2, 128): Tiles(64, 64, Tuning(8, 3)),
}
"""Entries that differ where a program has 99 KiB of shared memory. Four stages of `up` at 16 rows
are 108 KiB. Compute capability 12.0 multiplies with mma.sync, as Ampere does."""

MATRIX_GRADIENT: dict[int, tuple[int, Tiles]] = {
    2: (128, Tiles(256, 64, Tuning(8, 5))),
    4: (64, Tiles(64, 32, Tuning(8, 5))),
}
"""Rows of a tile of the matrix, then its columns, depth and tuning, by bytes of a number.

The address of a gathered row is itself loaded. Triton divides the stages among the loads of such a
chain, so 5 stages are three buffers of rows, and 3 or 4 stages are two."""

COMBINE = Tiles(1024, 1, Tuning(8, 2))
"""The sum over a token's rows: its columns, its most warps. It has no contraction."""

OPERATIONS = ("up", "rows", "hidden gradient")
"""The operations of the table."""

BLOCK_ROWS = (16, 32, 64, 128)
"""Rows of a block that the table has entries for."""

DECODE: dict[int, Tiles] = {2: Tiles(64, 32, Tuning(4, 4)), 4: Tiles(32, 32, Tuning(4, 4))}
"""The products of single rows, by bytes of a number."""

_override: ContextVar[Mapping[str, Any] | None] = ContextVar("override", default=None)


@contextmanager
def using(entries: Mapping[str, Any]) -> Iterator[None]:
    """Programs traced inside take these tiles, by operation, instead of the table's.

    It is for tuning, and for measuring one change at a time. Operations of experts_async are
    "async up" and "async rows".
    """
    token = _override.set(entries)
    try:
        yield
    finally:
        _override.reset(token)


def override(operation: str) -> Any | None:
    """The entry of `using` for an operation, None where there is none."""
    return (_override.get() or {}).get(operation)


def tiles(operation: str, dtype: jnp.dtype, block_rows: int) -> Tiles:
    """The entry of the table. Raises ValueError for a block size that it does not hold."""
    if block_rows not in BLOCK_ROWS:
        raise ValueError(f"blocks of {block_rows} rows: the kernels take {BLOCK_ROWS}")
    if chosen := override(operation):
        return chosen
    if operation == "combine":
        return COMBINE
    key = operation, jnp.dtype(dtype).itemsize, block_rows
    if has_small_memory() and key in SMALL:
        return SMALL[key]
    if capability() < 90 and key in AMPERE:
        return AMPERE[key]
    return TABLE[key]


def matrix_gradient_tiles(dtype: jnp.dtype, columns: int) -> tuple[int, Tiles]:
    """The entry of MATRIX_GRADIENT, half as wide for a matrix that would not fill a tile."""
    rows, entry = MATRIX_GRADIENT[jnp.dtype(dtype).itemsize]
    return rows, entry if columns >= entry.bn else entry._replace(bn=entry.bn // 2)
