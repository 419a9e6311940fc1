"""Tiles of the grouped products by class of shape, and how many programs run them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import jax.numpy as jnp

from moe_kernels.launch import Tuning, capability

Eviction = Literal["", "evict_first", "evict_last"]


class Tiles(NamedTuple):
    """Sizes of a tile, and how its kernel is compiled."""

    bn: int
    """Columns of a program's tile (of each half, for the SwiGLU's)."""
    bk: int
    """Depth of a step."""
    tuning: Tuning
    group: int = 8
    """Blocks of an expert whose tiles are neighbours."""
    resident: int = 0
    """Persistent programs on each multiprocessor, which take tile after tile; 0: one program a
    tile."""
    keep_rows: Eviction = ""
    """How long L2 keeps what is read of the rows, and of the matrices."""
    keep_matrix: Eviction = ""
    fast_silu: bool = False
    """SwiGLU by the hardware's approximate tanh (kernel.sigmoid)."""


# By operation, bytes of a number and rows of a block. On sm_90, 4 warps at 128 rows spill, and so
# does the hidden gradient with 128 columns; the audit (python -m moe_kernels.audit) prints
# registers, spills and shared bytes of each.
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
    ("hidden gradient", 2, 128): Tiles(64, 64, Tuning(8, 4)),
    ("hidden gradient", 4, 16): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 32): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 64): Tiles(32, 32, Tuning(4, 3)),
    ("hidden gradient", 4, 128): Tiles(32, 32, Tuning(8, 3)),
}

AMPERE: dict[tuple[str, int, int], Tiles] = {
    ("up", 2, 128): Tiles(64, 64, Tuning(8, 3)),
}
"""What differs below compute capability 9.0: accumulators share the registers with mma.sync's
operands, and two of 128 columns spill."""

MATRIX_GRADIENT: dict[int, tuple[int, Tiles]] = {
    2: (128, Tiles(128, 64, Tuning(8, 3))),
    4: (64, Tiles(64, 32, Tuning(8, 3))),
}
"""Rows of a tile of the matrix, then its columns, by bytes of a number."""

OPERATIONS = ("up", "rows", "hidden gradient")
"""What the table holds tiles for."""

BLOCK_ROWS = (16, 32, 64, 128)
"""Rows of a block that there are kernels for."""


DECODE: dict[int, Tiles] = {2: Tiles(64, 64, Tuning(4, 4)), 4: Tiles(32, 64, Tuning(4, 4))}
"""Of the products of single rows, by bytes of a number."""

_override: ContextVar[Mapping[str, Tiles] | None] = ContextVar("override", default=None)


@contextmanager
def using(entries: Mapping[str, Tiles]) -> Iterator[None]:
    """Programs traced inside take these tiles by operation (up, rows, hidden gradient), whatever
    the table says: for tuning, and for measuring one idea at a time."""
    token = _override.set(entries)
    try:
        yield
    finally:
        _override.reset(token)


def tiles(operation: str, dtype: jnp.dtype, block_rows: int) -> Tiles:
    """The entry of the table. Raises ValueError for a block size that it does not hold."""
    if block_rows not in BLOCK_ROWS:
        raise ValueError(f"blocks of {block_rows} rows: the kernels take {BLOCK_ROWS}")
    if chosen := (_override.get() or {}).get(operation):
        return chosen
    key = operation, jnp.dtype(dtype).itemsize, block_rows
    return AMPERE.get(key, TABLE[key]) if capability() < 90 else TABLE[key]
