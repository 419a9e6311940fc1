"""The time of the matrices' gradients, out[e] = left^T right over each expert's rows: a bound.

A tile is BM x BN numbers of one expert's matrix, and its steps are along that expert's rows. So
tiles of unlike experts take unlike times. Programs start in the order of their numbers, each as
soon as a place on a multiprocessor is free.
"""

import heapq
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_kernels.predict.cache import Cache
from moe_kernels.predict.device import LAUNCH, Device
from moe_kernels.predict.product import Product, tile_seconds


class MatrixTiles(NamedTuple):
    """Tiles of one expert's matrix [M, N]."""

    down: int
    """Tiles along M."""
    across: int
    """Tiles along N."""

    @property
    def count(self) -> int:
        """Tiles of one matrix."""
        return self.down * self.across


def dram_bytes(
    counts: Int[np.ndarray, "E"], tiles: MatrixTiles, product: Product, device: Device
) -> float:
    """Bytes that come from DRAM, and those of the results that go there.

    Each side of a tile is a panel: all of the expert's rows, and BM or BN of their columns.
    """
    programs = len(counts) * tiles.count
    cache = Cache(device.l2_bytes)
    wave = device.multiprocessors * product.resident
    for start in range(0, programs, wave):
        for program in range(start, min(start + wave, programs)):
            expert, tile = divmod(program, tiles.count)
            row_panel, column_panel = divmod(tile, tiles.across)
            rows = int(counts[expert]) * product.itemsize
            cache.read((expert, "left", row_panel), rows * product.bm)
            cache.read((expert, "right", column_panel), rows * product.bn)
        cache.evict()
    return cache.read_bytes + programs * product.bm * product.bn * product.itemsize


def launch_seconds(
    counts: Int[np.ndarray, "E"],
    moved: float,
    tiles: MatrixTiles,
    product: Product,
    device: Device,
) -> float:
    """Seconds of the launch, which moves so many bytes from and to DRAM."""
    free = [0.0] * (device.multiprocessors * product.resident)  # when each place is free
    end = 0.0
    for count in counts:
        seconds = tile_seconds(product, math.ceil(int(count) / product.bk), device)
        for _ in range(tiles.count):
            done = free[0] + seconds
            heapq.heapreplace(free, done)
            end = max(end, done)
    return max(end, moved / device.memory) + LAUNCH
