"""The time of a grouped product on a GPU that is not there: a prediction, never a measurement.

A launch takes the longer of two times.

Memory: bytes from DRAM over its rate. The L2 cache is simulated tile after tile (least recently
used, rows one by one, a matrix's columns a panel), so the order of the tiles counts.

Multiprocessors: each tile is cdiv(depth, BK) steps. A step needs the matrix units for its FLOPs and
L2 for its bytes, and its data arrive `latency` after they are asked for. Without asynchronous
copies (one stage) a program waits for its data and then computes. Only the other programs resident
on the multiprocessor fill that wait. With s stages, s - 1 steps are in flight (Little's law). The
epilogue adds its special-function instructions, counted in the SASS.

Resident programs are the audit's, from registers and shared memory as ptxas reports them.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np


class Device(NamedTuple):
    """What the prediction knows of a GPU."""

    name: str
    arch: int
    multiprocessors: int
    gemm: float
    """FLOP/s that a large 16-bit product reaches (published measurements, not the data sheet)."""
    memory: float
    """Bytes per second of DRAM."""
    l2_bytes: float
    l2_rate: float
    """Bytes per second of L2 to all multiprocessors: 5120 bytes a clock at the boost clock."""
    latency: float
    """Seconds from a load to its data, from DRAM."""
    special: float
    """Special-function results per second of a multiprocessor. It has eight times as many
    multiplications with additions."""


H100 = Device(
    name="H100 SXM",
    arch=90,
    multiprocessors=132,
    gemm=795e12,
    memory=3.35e12,
    l2_bytes=50e6,
    l2_rate=5120 * 1.755e9,
    latency=6e-7,
    special=16 * 1.755e9,
)
A100 = Device(
    name="A100 80GB",
    arch=80,
    multiprocessors=108,
    gemm=250e12,
    memory=2.0e12,
    l2_bytes=40e6,
    l2_rate=5120 * 1.41e9,
    latency=6e-7,
    special=16 * 1.41e9,
)
DEVICES = {"H100": H100, "A100": A100}
LAUNCH = 3e-6
"""Seconds between dependent launches."""


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
    tiles: list[tuple[int, int, int]], source: np.ndarray, product: Product, device: Device
) -> float:
    """Bytes that come from DRAM, and those of the results that go there.

    source int[blocks, BM] says which row of the input each row reads, -1 for none. Tiles that run
    together share what they read.
    """
    row_bytes = product.depth * product.itemsize
    panel_bytes = row_bytes * product.bn * product.halves
    # The L2 cache, least recently used first: (-1, row) for a row, (expert, column) for a panel.
    cache: OrderedDict[tuple[int, int], float] = OrderedDict()
    cached = 0.0
    read = 0.0
    wave = device.multiprocessors * product.resident
    for start in range(0, len(tiles), wave):
        for expert, block, column in tiles[start : start + wave]:
            wanted = [((-1, int(row)), row_bytes) for row in source[block] if row >= 0]
            wanted.append(((expert, column), panel_bytes))
            for key, size in wanted:
                if key in cache:
                    cache.move_to_end(key)
                    continue
                cache[key] = size
                cached += size
                read += size
        # After the wave and not within it: the tiles of a wave read at the same time.
        while cached > device.l2_bytes and cache:
            cached -= cache.popitem(last=False)[1]
    return read + len(tiles) * product.bm * product.bn * product.stored * product.itemsize


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


def launch_seconds(
    counts: np.ndarray, source: np.ndarray, product: Product, device: Device
) -> tuple[float, float]:
    """(seconds of the launch, bytes from and to DRAM)."""
    tiles = order(counts, product)
    moved = dram_bytes(tiles, source, product, device)
    p = product.resident
    waves = math.ceil(len(tiles) / (device.multiprocessors * p))
    steps = math.ceil(product.depth / product.bk)
    special = p * product.special * product.threads / device.special
    stored = product.bm * product.bn * product.stored * product.itemsize
    store = p * stored * device.multiprocessors / device.l2_rate
    around = (3 if product.gathered else 2) * device.latency
    tile = steps * step_seconds(product, device) + special + store + around
    return max(waves * tile, moved / device.memory) + LAUNCH, moved


def other_seconds(moved: float, flops: float, device: Device) -> float:
    """Seconds of a step of XLA's own, as fast as memory and the plain GEMM allow."""
    return max(moved / device.memory, flops / device.gemm) + LAUNCH
