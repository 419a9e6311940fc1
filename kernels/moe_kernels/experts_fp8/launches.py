"""Each kernel of the FP8 experts as a function of arrays: its grid, its constants, its outputs."""

from typing import Any

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from moe_kernels.experts.plan import Plan
from moe_kernels.experts_fp8.shapes import GROUP, Tiles, tiles
from moe_kernels.launch import interpreting, launch
from moe_kernels.quantise import Quantised
from moe_kernels.quantise.reference import E4M3, TILE


def _block_grid(
    plan: Plan, columns: int, entry: Tiles, dtype: jnp.dtype
) -> tuple[Array, dict[str, Any]]:
    """(the expert of each tile of rows, constants).

    A tile may have fewer rows than a block of the plan, so each block's expert is repeated.
    """
    block_expert = jnp.repeat(plan.block_expert, plan.block_rows // entry.rows)
    column_tiles = -(-columns // TILE)
    constants = {
        "TILES": column_tiles,
        "BLOCKS": block_expert.size,
        "PROGRAMS": block_expert.size * column_tiles,
        "BM": entry.rows,
        # Columns and depth of a tile are those of a scale.
        "BN": TILE,
        "BK": TILE,
        "GROUP": GROUP,
        # The interpreter converts neither FP8 nor bfloat16 correctly: these do it by bits.
        "UPCAST": interpreting(),
        "ROUND": interpreting() and dtype == jnp.bfloat16,
    }
    return block_expert, constants


def up_projection(
    x: Quantised,
    gate_up: Quantised,
    plan: Plan,
    dtype: jnp.dtype,
    *,
    power_of_two: bool,
    save: bool,
) -> tuple[Quantised, Array]:
    """(hidden [R, F] in FP8, z [R, 2F] in `dtype`). z is [1, 1] and not written unless `save`."""
    from moe_kernels.experts_fp8.kernel import fp8_up_kernel

    rows = plan.assignment.size
    width = x.values.shape[1]
    hidden_width = gate_up.values.shape[1] // 2
    entry = tiles("up", plan.block_rows)
    block_expert, constants = _block_grid(plan, hidden_width, entry, dtype)
    z, values, scales = launch(
        fp8_up_kernel,
        (*x, *gate_up, plan.assignment, block_expert, plan.starts, plan.counts),
        (
            ShapeDtypeStruct((rows, 2 * hidden_width) if save else (1, 1), dtype),
            ShapeDtypeStruct((rows, hidden_width), E4M3),
            ShapeDtypeStruct((rows, constants["TILES"]), jnp.float32),
        ),
        (constants["PROGRAMS"],),
        entry.tuning,
        S=plan.row.size,
        D=width,
        F=hidden_width,
        K=plan.row.shape[1],
        SAVE=save,
        POWER_OF_TWO=power_of_two,
        **constants,
    )
    return Quantised(values, scales), z


def grouped_product(rows: Quantised, matrix: Quantised, plan: Plan, dtype: jnp.dtype) -> Array:
    """rows[r] M[e] in `dtype`, [R, N]; `matrix` holds M transposed, [E, N, D].

    Rows of unused blocks are not written.
    """
    from moe_kernels.experts_fp8.kernel import fp8_rows_kernel

    depth = rows.values.shape[1]
    columns = matrix.values.shape[1]
    entry = tiles("rows", plan.block_rows)
    block_expert, constants = _block_grid(plan, columns, entry, dtype)
    (out,) = launch(
        fp8_rows_kernel,
        (*rows, *matrix, block_expert, plan.starts, plan.counts),
        (ShapeDtypeStruct((len(rows.values), columns), dtype),),
        (constants["PROGRAMS"],),
        entry.tuning,
        KD=depth,
        N=columns,
        **constants,
    )
    return out
