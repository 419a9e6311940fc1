"""The time of a grouped product on a GPU that is not there: a prediction, never a measurement.

A launch takes the longer of two times.

Memory: bytes from DRAM over its rate. The L2 cache is simulated tile after tile (rows one by one
where they are gathered, a block's rows at once where not, a matrix's columns a panel), so the order
of the tiles counts.

Multiprocessors: each tile is cdiv(depth, BK) steps. A step needs the matrix units for its FLOPs and
L2 for its bytes, and its data arrive `latency` after they are asked for. Without asynchronous
copies (one stage) a program waits for its data and then computes. Only the other programs resident
on the multiprocessor fill that wait. With s stages, s - 1 steps are in flight (Little's law). The
epilogue adds its special-function instructions, counted in the SASS, and what it reads and stores.

The time is a bound: a step is the longer of its computation and its copy, as if they overlapped
perfectly, and the matrix units run at a large GEMM's rate. A real kernel is slower.

Resident programs are the audit's, from registers and shared memory as ptxas reports them.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_kernels.predict.cache import Cache
from moe_kernels.predict.device import LAUNCH, Device


class Product(NamedTuple):
    """A grouped product, with what the audit says of its kernel."""

    depth: int
    """Numbers of a row."""
    columns: int
    """Of its result (of each half, for the SwiGLU's)."""
    halves: int
    bm: int
    bn: int
    bk: int
    stages: int
    group: int
    resident: int
    """Programs that a multiprocessor holds at once."""
    special: int
    """Special-function instructions of a thread."""
    threads: int
    stored: int
    """Numbers stored for each of a tile's numbers."""
    gathered: bool
    loaded: int = 0
    """Numbers that the epilogue reads for each of a tile's numbers."""
    itemsize: int = 2
    rate: float = 1.0
    """Of the matrix units, over that of 16-bit numbers."""
    promoted: bool = False
    """Whether each step's product is scaled and added on the plain cores, while the matrix units
    of that program wait (FP8)."""


def order(counts: np.ndarray, product: Product) -> list[tuple[int, int, int]]:
    """(expert, block, column tile) of every used tile, in the order of the kernels' numbering."""
    across = math.ceil(product.columns / product.bn)
    found = []
    block = 0
    for expert, count in enumerate(counts):
        blocks = math.ceil(int(count) / product.bm)
        for first in range(0, blocks, product.group):
            size = min(product.group, blocks - first)
            found += [
                (expert, block + first + i, column) for column in range(across) for i in range(size)
            ]
        block += blocks
    return found


def dram_bytes(
    tiles: list[tuple[int, int, int]],
    source: Int[np.ndarray, "blocks rows"],
    product: Product,
    device: Device,
) -> float:
    """Bytes that come from DRAM, and those of the results that go there.

    `source` says which row of the input each row reads, -1 for none. Tiles that run together share
    what they read.
    """
    row_bytes = product.depth * product.itemsize
    panel_bytes = row_bytes * product.bn * product.halves
    cache = Cache(device.l2_bytes)
    wave = device.multiprocessors * product.resident
    for start in range(0, len(tiles), wave):
        for expert, block, column in tiles[start : start + wave]:
            if product.gathered:
                for row in source[block].tolist():
                    if row >= 0:
                        cache.read((-1, row), row_bytes)
            else:  # no other block reads these rows
                cache.read((-1, block), row_bytes * int((source[block] >= 0).sum()))
            cache.read((expert, column), panel_bytes)
        cache.evict()
    around = product.stored + product.loaded
    return cache.read_bytes + len(tiles) * product.bm * product.bn * around * product.itemsize


def step_seconds(product: Product, device: Device) -> float:
    """Seconds of one step of one program, with `resident` programs on each multiprocessor."""
    flops = 2 * product.bm * product.bn * product.bk * product.halves
    compute = flops * device.multiprocessors / (device.gemm * product.rate)
    if product.promoted:
        compute += product.bm * product.bn * product.halves / (8 * device.special)
    size = (product.bm + product.bn * product.halves) * product.bk * product.itemsize
    copy = size * device.multiprocessors / device.l2_rate
    p = product.resident
    # Steps a second of a multiprocessor, were neither matrix units nor L2 a limit.
    if product.stages < 2:
        rate = p / (device.latency + copy + compute)
    else:
        rate = p * (product.stages - 1) / (device.latency + copy)
    return p / min(rate, 1 / max(compute, copy))


def tile_seconds(product: Product, steps: int, device: Device) -> float:
    """Seconds of a program with one tile of so many steps."""
    p = product.resident
    special = p * product.special * product.threads / device.special
    around = product.bm * product.bn * (product.stored + product.loaded) * product.itemsize
    epilogue = p * around * device.multiprocessors / device.l2_rate
    # Loads that wait for each other: a gathered row's number, the first step, the epilogue's own.
    waits = 2 + product.gathered + (product.loaded > 0)
    return steps * step_seconds(product, device) + special + epilogue + waits * device.latency


def launch_seconds(tiles: int, moved: float, product: Product, device: Device) -> float:
    """Seconds of a launch of so many equal tiles, which moves so many bytes from and to DRAM."""
    waves = math.ceil(tiles / (device.multiprocessors * product.resident))
    steps = math.ceil(product.depth / product.bk)
    return max(waves * tile_seconds(product, steps, device), moved / device.memory) + LAUNCH
