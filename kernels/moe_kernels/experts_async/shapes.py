"""Tiles of the asynchronous products: two halves of 128 columns, 64 deep a step."""

from typing import NamedTuple

from moe_kernels.launch import Tuning

COLUMNS = 128
"""Columns of each half of a tile."""
DEPTH = 64
"""Depth of a step: 128 bytes, the widest swizzle of a TMA box."""
GROUP = 8
"""Blocks of an expert whose tiles are neighbours in the order of tiles (tile.locate)."""
BLOCK_ROWS = (64, 128)
"""Rows of a block. wgmma and tcgen05 multiply 64 rows or more, in groups of four warps."""


class Tiles(NamedTuple):
    """How a kernel is compiled."""

    tuning: Tuning
    """Warps that multiply, a warp for 16 rows, and buffers."""
    loaders: int
    """Warps that copy. cp.async takes many, and TMA one, because one thread starts a copy."""
    registers: int
    """Registers of a thread that copies. Those that multiply take what is left (setmaxnreg)."""


# By operation and rows of a block. `python -m moe_kernels.audit` compiles each entry; none has run
# on a GPU. Four buffers of 128 rows are 192 KiB, and the epilogue takes 32 KiB more on Hopper.
TABLE: dict[tuple[str, int], Tiles] = {
    ("up", 64): Tiles(Tuning(4, 4), 4, 64),
    ("up", 128): Tiles(Tuning(8, 4), 4, 64),
    ("rows", 64): Tiles(Tuning(4, 4), 1, 40),
    ("rows", 128): Tiles(Tuning(8, 4), 1, 40),
}
