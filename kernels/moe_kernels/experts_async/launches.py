"""The asynchronous kernels as functions of arrays: grid, constants, boxes of TMA, outputs."""

from typing import Any

from jax import Array, ShapeDtypeStruct

from moe_kernels.experts.plan import Plan
from moe_kernels.experts_async.shapes import DEPTH, GROUP, Tiles, tiles
from moe_kernels.launch import capability, launch, multiprocessors

TENSOR_MEMORY = 100
"""The compute capability with tcgen05, and with a TMA that gathers rows."""


def _constants(plan: Plan, columns: int, width: int, entry: Tiles) -> dict[str, Any]:
    """What both kernels have in common. A tile of the output is `width` columns wide."""
    column_tiles = -(-columns // width)
    blocks = plan.block_expert.size
    return {
        "S": plan.row.size,
        "N": columns,
        "K": plan.row.shape[1],
        "TENSOR_MEMORY": capability() >= TENSOR_MEMORY,
        "TILES": column_tiles,
        "BLOCKS": blocks,
        # One program has most of a multiprocessor's shared memory.
        "PROGRAMS": min(blocks * column_tiles, multiprocessors()),
        "GROUP": GROUP,
        "BM": plan.block_rows,
        "BN": entry.columns,
        "BK": DEPTH,
        "STAGES": entry.tuning.stages,
        "LOADERS": entry.loaders,
        "REGISTERS": entry.registers,
        "TAKERS": entry.takers,
        "SHARE": entry.share,
    }


def up_projection(x: Array, gate_up: Array, plan: Plan, *, save: bool) -> tuple[Array, Array]:
    """experts.launches.up_projection: (hidden [R, F], z [R, 2F], [1, 1] unless `save`)."""
    from moe_kernels.experts_async.kernel import up_async_kernel

    rows = plan.assignment.size
    hidden_width = gate_up.shape[2] // 2
    entry = tiles("up", plan.block_rows)
    constants = _constants(plan, hidden_width, entry.columns, entry)
    boxes: dict[int, tuple[int, ...]] = {1: (1, DEPTH, entry.columns)}
    if constants["TENSOR_MEMORY"]:
        boxes[0] = (1, DEPTH)
    z, hidden = launch(
        up_async_kernel,
        (x, gate_up, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (
            ShapeDtypeStruct((rows, 2 * hidden_width) if save else (1, 1), x.dtype),
            ShapeDtypeStruct((rows, hidden_width), x.dtype),
        ),
        (constants["PROGRAMS"],),
        entry.tuning,
        boxes=boxes,
        KD=x.shape[1],
        T=len(x),
        SAVE=save,
        **constants,
    )
    return hidden, z


def grouped_product(rows: Array, matrix: Array, plan: Plan) -> Array:
    """rows[r] matrix[e], [R, N]. Rows of unused blocks are not written."""
    from moe_kernels.experts_async.kernel import rows_async_kernel

    depth = rows.shape[1]
    columns = matrix.shape[2]
    entry = tiles("rows", plan.block_rows)
    constants = _constants(plan, columns, 2 * entry.columns, entry)
    (out,) = launch(
        rows_async_kernel,
        (rows, matrix, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (ShapeDtypeStruct((len(rows), columns), rows.dtype),),
        (constants["PROGRAMS"],),
        entry.tuning,
        boxes={0: (plan.block_rows, DEPTH), 1: (1, DEPTH, entry.columns)},
        KD=depth,
        **constants,
    )
    return out
