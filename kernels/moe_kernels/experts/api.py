"""mixture: the experts' outputs summed for each token, with gradients, all through kernels."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Float, Int

from moe_kernels.experts.shapes import DECODE, MATRIX_GRADIENT, tiles
from moe_kernels.launch import Tuning, interpreting, launch, multiprocessors, require

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Schedule(Protocol):
    """Which row computes what: R rows in blocks of one expert each, S = T·K assignments."""

    @property
    def counts(self) -> Int[Array, "E"]:
        """Rows of each expert."""
        ...

    @property
    def starts(self) -> Int[Array, "E"]:
        """Its first row, a multiple of block_rows."""
        ...

    @property
    def assignment(self) -> Int[Array, "R"]:
        """t·K + k of a row, S where it is padding."""
        ...

    @property
    def row(self) -> Int[Array, "T K"]:
        """The inverse; R where the assignment has no row."""
        ...

    @property
    def experts(self) -> Int[Array, "T K"]:
        """The expert of each assignment, E where it has no row."""
        ...

    @property
    def block_expert(self) -> Int[Array, "blocks"]:
        """The expert of each block."""
        ...

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        ...


class Saved(NamedTuple):
    """What the backward pass needs: beside the inputs, z alone."""

    x: Float[Array, "T D"]
    weights: Float[Array, "T K"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    plan: Any
    z: Float[Array, "R twoF"]


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Schedule,
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · swiglu(x[t] gate_up[e]) down[e], e the k-th expert of t.

    Sums in float32 in a fixed order; without atomics, so the same bits from run to run. The
    backward pass keeps x, the pre-activation z and the routing: the second product's output is not
    kept, the gate weight's gradient comes from dA' = d_out down^T (arXiv:2512.14080). Without
    gradients, and with no more assignments than experts (decoding), each assignment is a row of its
    own, and nothing is sorted or padded.

    Raises UnavailableError where kernels cannot run, ValueError for dtypes or shapes that do not
    fit.
    """
    require()
    check(x, weights, gate_up, down)
    if x.size == 0:
        return x
    return _mixture(x, weights, gate_up, down, plan)


def check(x: Array, weights: Array, gate_up: Array, down: Array) -> None:
    """One line that names what does not fit."""
    dtypes = {array.dtype for array in (x, gate_up, down)}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"x {x.dtype}, gate_up {gate_up.dtype} and down {down.dtype} must be of one dtype: "
            "float32, bfloat16 or float16"
        )
    width, hidden = x.shape[-1], down.shape[1]
    wanted = ((len(down), width, 2 * hidden), (len(down), hidden, width))
    if (gate_up.shape, down.shape) != wanted or len(weights) != len(x):
        raise ValueError(
            f"x {x.shape}, weights {weights.shape}, gate_up {gate_up.shape} and down {down.shape} "
            "do not fit [T, D], [T, K], [E, D, 2F] and [E, F, D]"
        )


@jax.custom_vjp
def _mixture(x: Array, weights: Array, gate_up: Array, down: Array, plan: Any) -> Array:
    if plan.experts.size <= len(down):
        return _decode(x, weights, gate_up, down, plan.experts)
    hidden, _ = _up(x, gate_up, plan, save=False)
    return combine(_rows(hidden, down, plan), plan.row, weights)


def _save(x: Array, weights: Array, gate_up: Array, down: Array, plan: Any) -> tuple[Array, Saved]:
    hidden, z = _up(x, gate_up, plan, save=True)
    out = combine(_rows(hidden, down, plan), plan.row, weights)
    return out, Saved(x, weights, gate_up, down, plan, z)


def backward(saved: Saved, d_out: Array) -> tuple[Array, Array, Array, Array, None]:
    x, weights, gate_up, down, plan, z = saved
    dz, weighted, d_row = _hidden_gradient(d_out, down, z, weights, plan)
    d_down = _matrix_gradient(weighted, d_out, plan, gathered="right")
    d_gate_up = _matrix_gradient(x, dz, plan, gathered="left")
    dx = combine(_rows(dz, gate_up, plan, transposed=True), plan.row)
    own = plan.row < plan.assignment.size
    d_weights = jnp.where(own, jnp.take(d_row, plan.row, mode="clip"), 0.0)
    return dx, d_weights.astype(weights.dtype), d_gate_up, d_down, None


_mixture.defvjp(_save, backward)


def arithmetic(dtype: jnp.dtype) -> dict[str, Any]:
    """float32 products are exact, as JAX's on a CPU; UPCAST: see kernel.product."""
    return {"PRECISION": "ieee", "UPCAST": interpreting() and dtype == jnp.bfloat16}


def _blocks(plan: Any, columns: int, operation: str, dtype: jnp.dtype) -> tuple[Any, ...]:
    """(grid, tuning, constants) of a kernel whose tiles are blocks x columns."""
    chosen = tiles(operation, dtype, plan.block_rows)
    blocks, across = plan.block_expert.size, -(-columns // chosen.bn)
    programs = blocks * across
    if chosen.resident:
        programs = min(programs, chosen.resident * multiprocessors())
    constants = {
        "TILES": across,
        "BLOCKS": blocks,
        "PROGRAMS": programs,
        "BM": plan.block_rows,
        "BN": chosen.bn,
        "BK": chosen.bk,
        "GROUP": chosen.group,
        "KEEP_ROWS": chosen.keep_rows,
        "KEEP_MATRIX": chosen.keep_matrix,
        **arithmetic(dtype),
    }
    return (programs,), chosen.tuning, constants


def _up(x: Array, gate_up: Array, plan: Any, save: bool) -> tuple[Array, Array]:
    """(hidden [R, F], z [R, 2F], or an empty z)."""
    from moe_kernels.experts.kernel import up_kernel

    rows, width, hidden = plan.assignment.size, x.shape[1], gate_up.shape[2] // 2
    grid, tuning, constants = _blocks(plan, hidden, "up", x.dtype)
    z = ShapeDtypeStruct((rows, 2 * hidden) if save else (1, 1), x.dtype)
    z, result = launch(
        up_kernel,
        (x, gate_up, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (z, ShapeDtypeStruct((rows, hidden), x.dtype)),
        grid,
        tuning,
        S=plan.row.size,
        D=width,
        F=hidden,
        K=plan.row.shape[1],
        SAVE=save,
        FAST_SILU=tiles("up", x.dtype, plan.block_rows).fast_silu,
        **constants,
    )
    return result, z


def grouped(
    rows: Float[Array, "N KD"],
    matrix: Float[Array, "E KD N"],
    plan: Schedule,
    gathered: bool = False,
) -> Float[Array, "R N"]:
    """out[r] = rows[r] matrix[e], e the expert of row r; gathered: rows[token of r] instead.

    Rows of unused blocks are not written. No gradients: they are `mixture`'s.
    """
    require()
    return _rows(rows, matrix, plan, gathered=gathered)


def _rows(
    rows: Array, matrix: Array, plan: Any, transposed: bool = False, gathered: bool = False
) -> Array:
    """rows[r] matrix[e], or rows[r] matrix[e]^T; rows of unused blocks are not written."""
    from moe_kernels.experts.kernel import rows_kernel

    depth = rows.shape[1]
    columns = matrix.shape[1] if transposed else matrix.shape[2]
    strides = (1, depth) if transposed else (columns, 1)
    grid, tuning, constants = _blocks(plan, columns, "rows", rows.dtype)
    (out,) = launch(
        rows_kernel,
        (rows, matrix, plan.assignment, plan.block_expert, plan.starts, plan.counts),
        (ShapeDtypeStruct((plan.assignment.size, columns), rows.dtype),),
        grid,
        tuning,
        S=plan.row.size,
        KD=depth,
        N=columns,
        K=plan.row.shape[1],
        GATHER=gathered,
        STRIDE_K=strides[0],
        STRIDE_N=strides[1],
        **constants,
    )
    return out


def _hidden_gradient(
    d_out: Array, down: Array, z: Array, weights: Array, plan: Any
) -> tuple[Array, Array, Array]:
    """(dz [R, 2F], s·A [R, F], the gate weights' gradients by row [R])."""
    from moe_kernels.experts.kernel import hidden_gradient_kernel

    rows, (_, hidden, width) = len(z), down.shape
    grid, tuning, constants = _blocks(plan, hidden, "hidden gradient", z.dtype)
    dz, weighted, partial = launch(
        hidden_gradient_kernel,
        (
            d_out,
            down,
            z,
            weights,
            plan.assignment,
            plan.block_expert,
            plan.starts,
            plan.counts,
        ),
        (
            ShapeDtypeStruct(z.shape, z.dtype),
            ShapeDtypeStruct((rows, hidden), z.dtype),
            ShapeDtypeStruct((constants["TILES"], rows), jnp.float32),
        ),
        grid,
        tuning,
        S=plan.row.size,
        D=width,
        F=hidden,
        K=plan.row.shape[1],
        R=rows,
        **constants,
    )
    return dz, weighted, jnp.sum(partial, axis=0)


def _matrix_gradient(left: Array, right: Array, plan: Any, gathered: str) -> Array:
    """[E, M, N]: for each expert the sum over its rows of left^T right; `gathered`, left or right,
    says which side is per token."""
    from moe_kernels.experts.kernel import matrix_gradient_kernel

    m, n, experts = left.shape[1], right.shape[1], plan.counts.size
    bm, chosen = MATRIX_GRADIENT[left.dtype.itemsize]
    tiles_m, tiles_n = -(-m // bm), -(-n // chosen.bn)
    (out,) = launch(
        matrix_gradient_kernel,
        (left, right, plan.assignment, plan.starts, plan.counts),
        (ShapeDtypeStruct((experts, m, n), left.dtype),),
        (experts * tiles_m * tiles_n,),
        chosen.tuning,
        S=plan.row.size,
        M=m,
        N=n,
        K=plan.row.shape[1],
        GATHER_LEFT=gathered == "left",
        GATHER_RIGHT=gathered == "right",
        TILES_M=tiles_m,
        TILES_N=tiles_n,
        BM=bm,
        BN=chosen.bn,
        BK=chosen.bk,
        **arithmetic(left.dtype),
    )
    return out


def _decode(x: Array, weights: Array, gate_up: Array, down: Array, experts: Array) -> Array:
    """mixture with a row for each assignment, which reads that expert's matrices for itself."""
    per_token, real = experts.shape[1], experts < len(down)
    hidden = _single_rows(x, gate_up, experts, per_token, swiglu=True)
    y = _single_rows(hidden, down, experts, per=1, swiglu=False)
    row = jnp.where(real, jnp.arange(experts.size).reshape(experts.shape), experts.size)
    return combine(y, row, weights)


def _single_rows(vectors: Array, matrix: Array, experts: Array, per: int, swiglu: bool) -> Array:
    """vectors[s // per] matrix[experts[s]] of each assignment s; after swiglu, half as wide."""
    from moe_kernels.experts.decode_kernel import decode_kernel

    _, depth, columns = matrix.shape
    columns = columns // 2 if swiglu else columns
    chosen = DECODE[vectors.dtype.itemsize]
    across = -(-columns // chosen.bn)
    (out,) = launch(
        decode_kernel,
        (vectors, matrix, experts),
        (ShapeDtypeStruct((experts.size, columns), vectors.dtype),),
        (experts.size * across,),
        chosen.tuning,
        E=len(matrix),
        KD=depth,
        N=columns,
        PER=per,
        SWIGLU=swiglu,
        TILES=across,
        BN=chosen.bn,
        BK=chosen.bk,
        UPCAST=arithmetic(vectors.dtype)["UPCAST"],
    )
    return out


def combine(
    rows: Float[Array, "R D"], row: Int[Array, "T K"], weights: Float[Array, "T K"] | None = None
) -> Float[Array, "T D"]:
    """out[t] = sum_k w[t, k] · rows[row[t, k]] in float32, without w the plain sum; k after k, so
    the same bits every time. An index of R adds nothing."""
    from moe_kernels.experts.kernel import combine_kernel

    (tokens, per_token), width = row.shape, rows.shape[1]
    tile = min(1024, 1 << (width - 1).bit_length())
    (out,) = launch(
        combine_kernel,
        (rows, row, row if weights is None else weights),
        (ShapeDtypeStruct((tokens, width), rows.dtype),),
        (tokens, -(-width // tile)),
        Tuning(warps=max(1, min(8, tile // 128)), stages=2),
        R=len(rows),
        D=width,
        K=per_token,
        WEIGHTED=weights is not None,
        BD=tile,
        UPCAST=arithmetic(rows.dtype)["UPCAST"],
    )
    return out
