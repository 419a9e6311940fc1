"""mixture on FP8 operands: quantise, two grouped products, combine; gradients in 16 bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Float

from moe_kernels.experts import api as experts
from moe_kernels.experts.api import Saved, Schedule
from moe_kernels.experts_fp8.shapes import GROUP, tiles
from moe_kernels.launch import Tuning, interpreting, launch, require_fp8
from moe_kernels.quantise import Quantised, quantise_matrices, quantise_rows
from moe_kernels.quantise.reference import E4M3, TILE


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Schedule,
    power_of_two: bool = False,
) -> Float[Array, "T D"]:
    """experts.mixture with both products on E4M3 operands (DeepSeek-V3, arXiv:2412.19437, §3.3).

    x and the activation between the products have a scale for 1x128 numbers, the matrices one for
    128x128 (float32, or powers of two); a token is quantised once, before it is gathered. Products
    of 128 along the contraction are added in float32. Gradients are straight-through, by the
    kernels of experts.mixture in x's dtype, from the unquantised x and matrices and from z as the
    FP8 product gave it. As repeatable as experts.mixture.

    Raises UnavailableError where FP8 kernels cannot run (compute capability below 8.9), ValueError
    for dtypes or shapes that do not fit.
    """
    require_fp8()
    experts.check(x, weights, gate_up, down)
    if x.size == 0:
        return x
    return _mixture(x, weights, gate_up, down, plan, power_of_two)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mixture(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Any, power_of_two: bool
) -> Array:
    return _forward(x, weights, gate_up, down, plan, power_of_two, save=False)[0]


def _forward(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Any, power_of_two: bool, save: bool
) -> tuple[Array, Array]:
    """(out, z or an empty z)"""
    rows = quantise_rows(x, power_of_two, "triton")
    matrices = quantise_matrices(gate_up, 2, power_of_two, "triton")
    hidden, z = _up(rows, matrices, plan, x.dtype, power_of_two, save)
    y = _rows(hidden, quantise_matrices(down, 1, power_of_two, "triton"), plan, x.dtype)
    return experts.combine(y, plan.row, weights), z


def _save(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Any, power_of_two: bool
) -> tuple[Array, Saved]:
    out, z = _forward(x, weights, gate_up, down, plan, power_of_two, save=True)
    return out, Saved(x, weights, gate_up, down, plan, z)


def _backward(
    power_of_two: bool, saved: Saved, d_out: Array
) -> tuple[Array, Array, Array, Array, None]:
    return experts.backward(saved, d_out)


_mixture.defvjp(_save, _backward)


def _blocks(
    plan: Any, columns: int, operation: str, dtype: jnp.dtype
) -> tuple[Array, Tuning, dict[str, Any]]:
    """(the expert of each tile of rows, tuning, constants)."""
    chosen = tiles(operation, plan.block_rows)
    block_expert = jnp.repeat(plan.block_expert, plan.block_rows // chosen.rows)
    across = -(-columns // TILE)
    constants = {
        "TILES": across,
        "BLOCKS": block_expert.size,
        "PROGRAMS": block_expert.size * across,
        "BM": chosen.rows,
        "BN": TILE,
        "BK": TILE,
        "GROUP": GROUP,
        "UPCAST": interpreting(),
        "ROUND": interpreting() and dtype == jnp.bfloat16,
    }
    return block_expert, chosen.tuning, constants


def _up(
    x: Quantised, gate_up: Quantised, plan: Any, dtype: jnp.dtype, power_of_two: bool, save: bool
) -> tuple[Quantised, Array]:
    """(hidden [R, F] in FP8, z [R, 2F] in `dtype`, or an empty z)."""
    from moe_kernels.experts_fp8.kernel import fp8_up_kernel

    rows, width, hidden = plan.assignment.size, x.values.shape[1], gate_up.values.shape[1] // 2
    block_expert, tuning, constants = _blocks(plan, hidden, "up", dtype)
    z, values, scales = launch(
        fp8_up_kernel,
        (*x, *gate_up, plan.assignment, block_expert, plan.starts, plan.counts),
        (
            ShapeDtypeStruct((rows, 2 * hidden) if save else (1, 1), dtype),
            ShapeDtypeStruct((rows, hidden), E4M3),
            ShapeDtypeStruct((rows, constants["TILES"]), jnp.float32),
        ),
        (constants["PROGRAMS"],),
        tuning,
        S=plan.row.size,
        D=width,
        F=hidden,
        K=plan.row.shape[1],
        SAVE=save,
        POWER_OF_TWO=power_of_two,
        **constants,
    )
    return Quantised(values, scales), z


def _rows(rows: Quantised, matrix: Quantised, plan: Any, dtype: jnp.dtype) -> Array:
    """rows[r] M[e] in `dtype`, M transposed in `matrix`; rows of unused blocks are not written."""
    from moe_kernels.experts_fp8.kernel import fp8_rows_kernel

    depth, columns = rows.values.shape[1], matrix.values.shape[1]
    block_expert, tuning, constants = _blocks(plan, columns, "rows", dtype)
    (out,) = launch(
        fp8_rows_kernel,
        (*rows, *matrix, block_expert, plan.starts, plan.counts),
        (ShapeDtypeStruct((len(rows.values), columns), dtype),),
        (constants["PROGRAMS"],),
        tuning,
        KD=depth,
        N=columns,
        **constants,
    )
    return out
