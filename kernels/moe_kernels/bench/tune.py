"""The fastest tiles of each operation, to be written into moe_kernels/experts/shapes.py."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from moe_kernels.bench.launches import Work, all_work
from moe_kernels.bench.peers import Peers
from moe_kernels.bench.programs import Program, runnable
from moe_kernels.bench.shapes import Shape
from moe_kernels.experts.shapes import OPERATIONS, Tiles, using
from moe_kernels.launch import Tuning
from moe_kernels.schedule import choose_block_rows
from moe_kernels.timing import paired

LAUNCHES_OF = {
    "up": ("up",),
    "rows": ("down", "input gradient"),
    "hidden gradient": ("hidden gradient",),
    "matrix gradient": ("down gradient", "gate_up gradient"),
}
"""The launches that read an operation's tiles. Only these are compiled and timed for it."""
TABLE = "table"
"""The name of the table's own tiles among the candidates."""


def all_candidates(operation: str) -> list[Tiles]:
    """Tiles to try for 16-bit numbers."""
    # `up` and the hidden gradient need more registers a column than the other two.
    wide = operation in ("rows", "matrix gradient")
    columns = (64, 128, 256) if wide else (64, 128)
    # The matrices' gradients divide their stages among two loads, and have no persistent programs.
    stages = (3, 4, 5) if operation == "matrix gradient" else (3, 4)
    resident = (0, 1) if operation in OPERATIONS else (0,)
    grid = itertools.product(columns, (32, 64, 128), (4, 8), stages, resident)
    return [
        Tiles(bn, bk, Tuning(warps, s), resident=programs) for bn, bk, warps, s, programs in grid
    ]


PICKED = {
    "up": [
        Tiles(128, 64, Tuning(8, 4)),
        Tiles(128, 32, Tuning(8, 4)),
        Tiles(64, 64, Tuning(4, 4)),
        Tiles(64, 64, Tuning(8, 4)),
        Tiles(128, 64, Tuning(8, 3), resident=1),
    ],
    "rows": [
        Tiles(256, 64, Tuning(8, 4)),
        Tiles(256, 32, Tuning(8, 4)),
        Tiles(128, 64, Tuning(8, 4)),
        Tiles(128, 64, Tuning(4, 4)),
        Tiles(256, 64, Tuning(8, 3), resident=1),
    ],
    "hidden gradient": [
        Tiles(128, 64, Tuning(8, 4)),
        Tiles(64, 64, Tuning(8, 3)),
        Tiles(64, 64, Tuning(4, 4)),
        Tiles(128, 32, Tuning(8, 4)),
        Tiles(64, 128, Tuning(8, 3)),
    ],
    "matrix gradient": [
        Tiles(256, 64, Tuning(8, 3)),
        Tiles(128, 64, Tuning(8, 5)),
        Tiles(128, 64, Tuning(4, 5)),
        Tiles(256, 32, Tuning(8, 5)),
        Tiles(128, 128, Tuning(8, 3)),
    ],
}
"""Neighbours of the table's entries at 128 rows of 16 bits: one more or less of everything. Five
with the table's own entry take a minute."""


def tune(
    name: str,
    shape: Shape,
    dtype: str,
    peers: Peers,
    *,
    rounds: int,
    candidates: Callable[[str], Sequence[Tiles]] = all_candidates,
    operations: Sequence[str] = tuple(LAUNCHES_OF),
) -> dict[str, Any]:
    """The table's tiles and the five fastest of each operation, in milliseconds.

    One operation is changed at a time, and only its own launches are compiled and timed.
    """
    work = all_work(shape, dtype, peers)
    best = {}
    for operation in operations:
        launches = [work[launch] for launch in LAUNCHES_OF[operation]]
        # The table's own tiles are the first: what is not faster need not be written.
        made = {TABLE: runnable(f"{operation} {TABLE}", partial(together, launches))}
        for entry in candidates(operation):
            with using({operation: entry}):
                made[str(entry)] = runnable(f"{operation} {entry}", partial(together, launches))
        calls = {text: call for text, call in made.items() if call}
        medians = {
            text: 1e3 * float(np.median(times)) for text, times in paired(calls, rounds).items()
        }
        order = sorted(medians, key=medians.__getitem__)
        fastest = {text: medians[text] for text in order[:5]}
        best[operation] = {TABLE: medians.get(TABLE), "fastest": fastest}
        print(f"{name} {operation}: {next(iter(order), 'nothing ran')}", flush=True)
    rows = choose_block_rows(shape.tokens * shape.per_token, shape.experts)
    return {"name": name, "dtype": dtype, "block_rows": rows, "tuned_ms": best}


def together(launches: Sequence[Work]) -> Program:
    """One program of launches, each on its own arrays."""

    def run(*arrays: tuple[Any, ...]) -> list[Any]:
        return [work.function(*own) for work, own in zip(launches, arrays, strict=True)]

    return Program(run, tuple(work.arrays for work in launches))
