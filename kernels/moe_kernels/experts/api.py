"""mixture: the experts' outputs summed for each token, with gradients, all through kernels."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_kernels.experts.launches import (
    combine_rows,
    grouped_product,
    hidden_gradient,
    matrix_gradient,
    single_rows,
    up_projection,
)
from moe_kernels.experts.plan import Plan
from moe_kernels.launch import require_triton

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Source(NamedTuple):
    """Matrices of more experts than a plan has, as of a stack of layers: its expert e is number
    `first` + e."""

    gate_up: Float[Array, "experts D twoF"]
    down: Float[Array, "experts F D"]
    first: int | Int[Array, ""] = 0


class Saved(NamedTuple):
    """What the backward pass needs: the inputs, and of all intermediate arrays z alone."""

    x: Float[Array, "T D"]
    weights: Float[Array, "T K"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    plan: Plan
    z: Float[Array, "R twoF"]


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
    source: Source | None = None,
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · swiglu(x[t] gate_up[e]) down[e], e the k-th expert of t.

    Sums are in float32 and in a fixed order, without atomics: the same bits from run to run.

    The backward pass keeps x, the pre-activation z and the routing. The second product's output is
    not kept: the gate weight's gradient comes from dA' = d_out down^T (arXiv:2512.14080).

    Without gradients, and with no more assignments than experts (decoding), each assignment is a
    row of its own. Nothing is sorted or padded then.

    In float16 z overflows above 65,504. The output does not, because it comes from the float32
    accumulators. The gradients of such a number are inf or NaN.

    With a `source`, which has the same matrices among others, the kernels read them there, where
    they lie. gate_up and down are then not read. They only receive the gradients, so that nothing
    is copied out of a stack of layers.

    Raises UnavailableError where kernels cannot run, and ValueError for dtypes or shapes that do
    not fit.
    """
    require_triton()
    check(x, weights, gate_up, down)
    if x.size == 0:  # a grid of no programs cannot be launched
        return x
    if source is not None:
        return _mixture_from(x, weights, gate_up, down, source, plan)
    return _mixture(x, weights, gate_up, down, plan)


def check(x: Array, weights: Array, gate_up: Array, down: Array) -> None:
    """Raises ValueError with one line that names what does not fit."""
    dtypes = {array.dtype for array in (x, gate_up, down)}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"x {x.dtype}, gate_up {gate_up.dtype} and down {down.dtype} must be of one dtype: "
            "float32, bfloat16 or float16"
        )
    width = x.shape[-1]
    hidden = down.shape[1]
    expected = ((len(down), width, 2 * hidden), (len(down), hidden, width))
    if (gate_up.shape, down.shape) != expected or len(weights) != len(x):
        raise ValueError(
            f"x {x.shape}, weights {weights.shape}, gate_up {gate_up.shape} and down {down.shape} "
            "do not fit [T, D], [T, K], [E, D, 2F] and [E, F, D]"
        )


@jax.custom_vjp
def _mixture(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> Array:
    # JAX calls this function only where no gradient is taken; with one it calls _save.
    if plan.experts.size <= len(down):
        return _decode(x, weights, gate_up, down, plan.experts)
    hidden, _ = up_projection(x, gate_up, plan, save=False)
    return combine(grouped_product(hidden, down, plan), plan.row, weights)


@jax.custom_vjp
def _mixture_from(
    x: Array, weights: Array, gate_up: Array, down: Array, source: Source, plan: Plan
) -> Array:
    shifted = _at_source(plan, source)
    hidden, _ = up_projection(x, source.gate_up, shifted, save=False)
    return combine(grouped_product(hidden, source.down, shifted), plan.row, weights)


def _save_from(
    x: Array, weights: Array, gate_up: Array, down: Array, source: Source, plan: Plan
) -> tuple[Array, tuple[Saved, Plan]]:
    out, saved = _save(x, weights, source.gate_up, source.down, _at_source(plan, source))
    return out, (saved, plan)


def _backward_from(
    saved: tuple[Saved, Plan], d_out: Array
) -> tuple[Array, Array, Array, Array, None, None]:
    dx, d_weights, d_gate_up, d_down, _ = backward(saved[0], d_out, saved[1])
    return dx, d_weights, d_gate_up, d_down, None, None


_mixture_from.defvjp(_save_from, _backward_from)


def _at_source(plan: Any, source: Source) -> Plan:
    """The plan with the numbers that its experts have in the source. The others have no rows."""

    def among_all(counts: Array) -> Array:
        of_all = jnp.zeros(len(source.down), counts.dtype)
        return lax.dynamic_update_slice(of_all, counts, (source.first,))

    return replace(
        plan,
        block_expert=plan.block_expert + source.first,
        starts=among_all(plan.starts),
        counts=among_all(plan.counts),
    )


def _save(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> tuple[Array, Saved]:
    hidden, z = up_projection(x, gate_up, plan, save=True)
    out = combine(grouped_product(hidden, down, plan), plan.row, weights)
    return out, Saved(x, weights, gate_up, down, plan, z)


def backward(
    saved: Saved, d_out: Array, own: Plan | None = None
) -> tuple[Array, Array, Array, Array, None]:
    """Gradients of x, weights, gate_up and down. The plan is integers and has none.

    `own` is the plan of the experts that get gradients, if saved.plan numbers those of a source.
    """
    x, weights, gate_up, down, plan, z = saved
    own = plan if own is None else own
    dz, weighted, d_row = hidden_gradient(d_out, down, z, weights, plan)
    d_down = matrix_gradient(weighted, d_out, own, gathered="right")
    d_gate_up = matrix_gradient(x, dz, own, gathered="left")
    dx = combine(grouped_product(dz, gate_up, plan, transposed=True), plan.row)
    # Rows of unused blocks were never written and may be NaN. `where` keeps them out; a product
    # with zero would not.
    has_row = plan.row < plan.assignment.size
    d_weights = jnp.where(has_row, jnp.take(d_row, plan.row, mode="clip"), 0.0)
    return dx, d_weights.astype(weights.dtype), d_gate_up, d_down, None


_mixture.defvjp(_save, backward)


def _decode(x: Array, weights: Array, gate_up: Array, down: Array, experts: Array) -> Array:
    """mixture with a row for each assignment, which reads that expert's matrices for itself."""
    per_token = experts.shape[1]
    hidden = single_rows(x, gate_up, experts, per_vector=per_token, swiglu=True)
    y = single_rows(hidden, down, experts, per_vector=1, swiglu=False)
    has_expert = experts < len(down)
    row = jnp.where(has_expert, jnp.arange(experts.size).reshape(experts.shape), experts.size)
    return combine(y, row, weights)


def grouped(
    rows: Float[Array, "rows D"],
    matrix: Float[Array, "E D N"],
    plan: Plan,
    gathered: bool = False,
) -> Float[Array, "R N"]:
    """out[r] = rows[r] matrix[e], e the expert of row r. If `gathered`, rows[token of r] matrix[e].

    `rows` are R, or T if gathered. D is the depth of the contraction, whatever it is in a layer.
    Rows of unused blocks are not written. It has no gradients: `mixture` has.
    """
    require_triton()
    if not plan.experts.size:  # a grid of no programs cannot be launched
        return jnp.zeros((plan.assignment.size, matrix.shape[2]), rows.dtype)
    return grouped_product(rows, matrix, plan, gathered=gathered)


def combine(
    rows: Float[Array, "R D"], row: Int[Array, "T K"], weights: Float[Array, "T K"] | None = None
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · rows[row[t, k]] in float32. Without weights the plain sum.

    It adds k after k, so the bits are the same every time. A row number of R adds nothing.
    """
    return combine_rows(rows, row, weights)
