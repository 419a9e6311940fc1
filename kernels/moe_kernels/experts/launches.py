"""Each kernel of the experts as a function of arrays: its grid, its constants, its outputs.

Kernels are imported inside the functions, because triton has wheels for Linux only.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from moe_kernels.experts.plan import Plan
from moe_kernels.experts.shapes import (
    BLOCK_ROWS,
    DECODE,
    Tiles,
    matrix_gradient_tiles,
    tiles,
)
from moe_kernels.launch import interpreting, launch, multiprocessors, next_power_of_two


def arithmetic(dtype: jnp.dtype) -> dict[str, Any]:
    """Constants of tile.product and tile.narrow.

    float32 products are exact ("ieee"), as JAX's are on a CPU. Triton's default is TF32.
    """
    return {"PRECISION": "ieee", "UPCAST": interpreting() and dtype == jnp.bfloat16}


def _block_grid(
    plan: Plan, columns: int, entry: Tiles, dtype: jnp.dtype
) -> tuple[tuple[int], dict[str, Any]]:
    """(grid, constants) of a kernel whose tiles are blocks x columns.

    The grid is over all blocks that any routing may need. Programs of unused blocks end at once.
    """
    blocks = plan.block_expert.size
    column_tiles = -(-columns // entry.bn)
    programs = blocks * column_tiles
    if entry.resident:
        programs = min(programs, entry.resident * multiprocessors())
    constants = {
        "TILES": column_tiles,
        "BLOCKS": blocks,
        "PROGRAMS": programs,
        "BM": plan.block_rows,
        "BN": entry.bn,
        "BK": entry.bk,
        "GROUP": entry.group,
        "KEEP_ROWS": entry.keep_rows,
        "KEEP_MATRIX": entry.keep_matrix,
        **arithmetic(dtype),
    }
    return (programs,), constants


def up_projection(x: Array, gate_up: Array, plan: Plan, *, save: bool) -> tuple[Array, Array]:
    """(hidden [R, F], z [R, 2F]). z is [1, 1] and not written unless `save`."""
    from moe_kernels.experts.kernel import up_kernel

    rows = plan.assignment.size
    width = x.shape[1]
    hidden_width = gate_up.shape[2] // 2
    entry = tiles("up", x.dtype, plan.block_rows)
    grid, constants = _block_grid(plan, hidden_width, entry, x.dtype)
    z, hidden = launch(
        up_kernel,
        (x, gate_up, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (
            ShapeDtypeStruct((rows, 2 * hidden_width) if save else (1, 1), x.dtype),
            ShapeDtypeStruct((rows, hidden_width), x.dtype),
        ),
        grid,
        entry.tuning,
        S=plan.row.size,
        D=width,
        F=hidden_width,
        K=plan.row.shape[1],
        SAVE=save,
        FAST_SILU=entry.fast_silu,
        **constants,
    )
    return hidden, z


def grouped_product(
    rows: Array, matrix: Array, plan: Plan, *, transposed: bool = False, gathered: bool = False
) -> Array:
    """rows[r] matrix[e], or rows[r] matrix[e]^T, [R, N]. Rows of unused blocks are not written."""
    from moe_kernels.experts.kernel import rows_kernel

    depth = rows.shape[1]
    columns = matrix.shape[1] if transposed else matrix.shape[2]
    # Strides of the contraction and of the columns in matrix[e].
    stride_k, stride_n = (1, depth) if transposed else (columns, 1)
    entry = tiles("rows", rows.dtype, plan.block_rows)
    grid, constants = _block_grid(plan, columns, entry, rows.dtype)
    (out,) = launch(
        rows_kernel,
        (rows, matrix, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (ShapeDtypeStruct((plan.assignment.size, columns), rows.dtype),),
        grid,
        entry.tuning,
        S=plan.row.size,
        KD=depth,
        N=columns,
        K=plan.row.shape[1],
        GATHER=gathered,
        STRIDE_K=stride_k,
        STRIDE_N=stride_n,
        **constants,
    )
    return out


def hidden_gradient(
    d_out: Array, down: Array, z: Array, weights: Array, plan: Plan
) -> tuple[Array, Array, Array]:
    """(dz [R, 2F], s·A [R, F], the gate weights' gradients by row [R])."""
    from moe_kernels.experts.kernel_backward import hidden_gradient_kernel

    rows = len(z)
    _, hidden_width, width = down.shape
    entry = tiles("hidden gradient", z.dtype, plan.block_rows)
    grid, constants = _block_grid(plan, hidden_width, entry, z.dtype)
    schedule = (plan.assignment, plan.block_expert, plan.starts, plan.counts)
    dz, weighted, partial = launch(
        hidden_gradient_kernel,
        (d_out, down, z, weights, *schedule),
        (
            ShapeDtypeStruct(z.shape, z.dtype),
            ShapeDtypeStruct((rows, hidden_width), z.dtype),
            ShapeDtypeStruct((constants["TILES"], rows), jnp.float32),
        ),
        grid,
        entry.tuning,
        S=plan.row.size,
        D=width,
        F=hidden_width,
        K=plan.row.shape[1],
        R=rows,
        **constants,
    )
    return dz, weighted, jnp.sum(partial, axis=0)


def matrix_gradient(
    left: Array, right: Array, plan: Plan, *, gathered: Literal["left", "right"]
) -> Array:
    """[E, M, N]: the sum of left^T right over each expert's rows. `gathered` is the side with a row
    per token."""
    from moe_kernels.experts.kernel_backward import matrix_gradient_kernel

    m = left.shape[1]
    n = right.shape[1]
    experts = plan.counts.size
    bm, entry = matrix_gradient_tiles(left.dtype, n)
    tiles_m = -(-m // bm)
    tiles_n = -(-n // entry.bn)
    (out,) = launch(
        matrix_gradient_kernel,
        (left, right, plan.assignment, plan.starts, plan.counts),
        (ShapeDtypeStruct((experts, m, n), left.dtype),),
        (experts * tiles_m * tiles_n,),
        entry.tuning,
        S=plan.row.size,
        M=m,
        N=n,
        K=plan.row.shape[1],
        GATHER_LEFT=gathered == "left",
        GATHER_RIGHT=gathered == "right",
        TILES_M=tiles_m,
        TILES_N=tiles_n,
        BM=bm,
        BN=entry.bn,
        BK=entry.bk,
        **arithmetic(left.dtype),
    )
    return out


def single_rows(
    vectors: Array, matrix: Array, experts: Array, *, per_vector: int, swiglu: bool
) -> Array:
    """vectors[s // per_vector] matrix[experts[s]] of each assignment s, [S, N].

    With `swiglu` the result is half as wide as the matrix.
    """
    from moe_kernels.experts.kernel_decode import decode_kernel

    _, depth, columns = matrix.shape
    columns = columns // 2 if swiglu else columns
    entry = DECODE[vectors.dtype.itemsize]
    column_tiles = -(-columns // entry.bn)
    (out,) = launch(
        decode_kernel,
        (vectors, matrix, experts),
        (ShapeDtypeStruct((experts.size, columns), vectors.dtype),),
        (experts.size * column_tiles,),
        entry.tuning,
        E=len(matrix),
        KD=depth,
        N=columns,
        PER=per_vector,
        SWIGLU=swiglu,
        TILES=column_tiles,
        BN=entry.bn,
        BK=entry.bk,
        STAGES=entry.tuning.stages,
        UPCAST=arithmetic(vectors.dtype)["UPCAST"],
    )
    return out


def combine_rows(rows: Array, row: Array, weights: Array | None) -> Array:
    """sum_k weights[t, k] · rows[row[t, k]], or the plain sum, [T, D]."""
    from moe_kernels.experts.kernel import combine_kernel

    tokens, per_token = row.shape
    width = rows.shape[1]
    entry = tiles("combine", rows.dtype, BLOCK_ROWS[0])  # the same for any block
    tile = min(entry.bn, next_power_of_two(width))
    (out,) = launch(
        combine_kernel,
        # A kernel has no optional pointers: without weights any array stands there, never read.
        (rows, row, row if weights is None else weights),
        (ShapeDtypeStruct((tokens, width), rows.dtype),),
        (tokens, -(-width // tile)),
        # 128 columns a warp are 4 a thread.
        entry.tuning._replace(warps=max(1, min(entry.tuning.warps, tile // 128))),
        R=len(rows),
        D=width,
        K=per_token,
        WEIGHTED=weights is not None,
        BD=tile,
        KEEP_ROWS=entry.keep_rows,
        STORE=entry.store,
        UPCAST=arithmetic(rows.dtype)["UPCAST"],
    )
    return out
