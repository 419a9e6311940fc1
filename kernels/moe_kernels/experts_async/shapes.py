"""Tiles of the asynchronous products: a block's rows by two halves of columns, 64 deep a step."""

from typing import NamedTuple

from moe_kernels.experts.shapes import override
from moe_kernels.launch import Tuning

DEPTH = 64
"""Depth of a step: 128 bytes, the widest swizzle of a TMA box."""
GROUP = 8
"""Blocks of an expert whose tiles are neighbours in the order of tiles (tile.locate)."""
BLOCK_ROWS = (64, 128)
"""Rows of a block. wgmma and tcgen05 multiply 64 rows or more, in groups of four warps."""


class Tiles(NamedTuple):
    """How a kernel is compiled."""

    takers: int
    """Partitions that multiply, in turn."""
    columns: int
    """Columns of each half of a tile."""
    tuning: Tuning
    """Warps of a partition that multiplies, and buffers."""
    loaders: int
    """Warps that copy. cp.async takes many, and TMA one, because one thread starts a copy."""
    registers: int
    """Registers of a thread that copies (setmaxnreg)."""
    share: int = 224
    """Registers of a thread of the second partition that multiplies. The first takes the rest."""


# By operation and rows of a block. `python -m moe_kernels.audit` compiles each entry, and none has
# run on a GPU.
TABLE: dict[tuple[str, int], Tiles] = {
    ("up", 64): Tiles(2, 128, Tuning(4, 4), 4, 56),
    ("up", 128): Tiles(2, 64, Tuning(4, 6), 4, 56),
    ("rows", 64): Tiles(2, 128, Tuning(4, 4), 1, 40),
    ("rows", 128): Tiles(2, 64, Tuning(4, 6), 1, 40),
}

COOPERATIVE: dict[str, Tiles] = {
    "async up": Tiles(1, 128, Tuning(8, 4), 4, 64),
    "async rows": Tiles(1, 128, Tuning(8, 4), 1, 40),
}
"""Entries for 128 rows with one partition that multiplies, for experts.shapes.using. Their tiles
are twice as wide, so they read L2 less, and no product runs beside an epilogue. To be measured."""


def tiles(operation: str, block_rows: int) -> Tiles:
    """The entry of `using`, or else of the table."""
    return override(f"async {operation}") or TABLE[operation, block_rows]
