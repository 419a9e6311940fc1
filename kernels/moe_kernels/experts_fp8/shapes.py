"""Tiles of the FP8 products: 128 columns wide and 128 deep a step, as one scale of a matrix."""

from typing import NamedTuple

from moe_kernels.launch import Tuning, has_small_memory


class Tiles(NamedTuple):
    """Rows of a program's tile, and how its kernel is compiled. Rows divide those of a block."""

    rows: int
    tuning: Tuning


# By operation and rows of a block. Two accumulators and a partial product of 128 rows and 128
# columns are 192 registers a thread. With 8 warps on sm_90 `up` spills 8 to 492 bytes then, so it
# takes 64 rows at a time.
TABLE: dict[tuple[str, int], Tiles] = {
    ("up", 16): Tiles(16, Tuning(4, 4)),
    ("up", 32): Tiles(32, Tuning(8, 4)),
    ("up", 64): Tiles(64, Tuning(8, 4)),
    ("up", 128): Tiles(64, Tuning(8, 4)),
    ("rows", 16): Tiles(16, Tuning(4, 4)),
    ("rows", 32): Tiles(32, Tuning(4, 4)),
    ("rows", 64): Tiles(64, Tuning(4, 4)),
    ("rows", 128): Tiles(128, Tuning(8, 4)),
}

SMALL: dict[tuple[str, int], Tiles] = {
    ("up", 16): Tiles(16, Tuning(4, 3)),
    ("up", 32): Tiles(32, Tuning(8, 3)),
    ("up", 64): Tiles(32, Tuning(8, 3)),
    ("up", 128): Tiles(32, Tuning(8, 3)),
    ("rows", 16): Tiles(16, Tuning(4, 3)),
    ("rows", 32): Tiles(32, Tuning(4, 3)),
    ("rows", 64): Tiles(64, Tuning(4, 3)),
    ("rows", 128): Tiles(128, Tuning(8, 3)),
}
"""Where a program has 99 KiB of shared memory: one stage less. Rows are fewer as well, because
mma.sync keeps its operands in registers."""

GROUP = 8
"""Tiles of rows of an expert that are neighbours in the order of programs (tile.locate)."""


def tiles(operation: str, block_rows: int) -> Tiles:
    """The entry of the table. Raises ValueError for a block size that it does not hold."""
    table = SMALL if has_small_memory() else TABLE
    if (operation, block_rows) not in table:
        raise ValueError(f"blocks of {block_rows} rows: the FP8 kernels take 16, 32, 64 or 128")
    return table[operation, block_rows]
