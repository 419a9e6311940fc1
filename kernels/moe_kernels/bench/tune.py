"""The fastest tiles of each operation, to be written into moe_kernels/experts/shapes.py."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_kernels.bench.peers import Peers
from moe_kernels.bench.programs import layer_calls
from moe_kernels.bench.shapes import Shape, make_inputs
from moe_kernels.experts.shapes import OPERATIONS, Tiles, tiles, using
from moe_kernels.launch import Tuning
from moe_kernels.timing import paired


def candidates(operation: str) -> list[Tiles]:
    """Tiles to try for 16-bit numbers."""
    # `up` and the hidden gradient need more registers a column than `rows`.
    columns = (64, 128) if operation != "rows" else (64, 128, 256)
    grid = itertools.product(columns, (32, 64, 128), (4, 8), (3, 4), (0, 1))
    return [
        Tiles(bn, bk, Tuning(warps, stages), resident=resident)
        for bn, bk, warps, stages, resident in grid
    ]


def tune(
    name: str, shape: Shape, dtype: str, peers: Peers, *, rounds: int, most: int | None
) -> dict[str, Any]:
    """The five fastest tiles of each operation, in milliseconds of the whole layer.

    One operation is changed at a time. `most` limits the number of candidates.
    """
    inputs = make_inputs(shape, dtype)
    plan = peers.make_plan(inputs.experts, shape.experts)
    best = {}
    for operation in OPERATIONS:
        calls = {}
        # The table's own entry is the first: what is not faster need not be written.
        for entry in [tiles(operation, jnp.dtype(dtype), plan.block_rows), *candidates(operation)]:
            with using({operation: entry}):
                kind = "train" if operation == "hidden gradient" else "forward"
                call = layer_calls(inputs, peers, ["triton"]).get(f"triton {kind}")
            if call:
                calls[str(entry)] = call
            if most and len(calls) >= most:
                break
        seconds = paired(calls, rounds)
        medians = {text: 1e3 * float(np.median(times)) for text, times in seconds.items()}
        order = sorted(medians, key=medians.__getitem__)
        best[operation] = {text: medians[text] for text in order[:5]}
        print(f"{name} {operation}: {order[0]}", flush=True)
    return {"name": name, "dtype": dtype, "block_rows": plan.block_rows, "tuned_ms": best}
