"""Step 5: adds up a token's expert outputs with the gate's weights."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.moe.plan import Plan
from moe_jax.moe.precision import wide


@jax.custom_vjp
def combine(
    rows: Float[Array, "R D"], weights: Float[Array, "T K"], plan: Plan
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · rows[row[t, k]], summed in float32 in the order of k.

    A dropped assignment adds nothing. The sum is deterministic, because it gathers by the plan's
    inverse and adds nothing atomically. The gradient of `rows` is the weighted dispatch, a gather
    as well.
    """
    # [T, K, D]. A dropped assignment has row R, out of range, which fills 0.
    gathered = jnp.take(rows, plan.row, axis=0, mode="fill", fill_value=0)
    out = jnp.einsum(
        "tk,tkd->td", weights.astype(rows.dtype), gathered, preferred_element_type=wide(rows.dtype)
    )
    return out.astype(rows.dtype)


def _forward(rows: Array, weights: Array, plan: Plan) -> tuple[Array, tuple[Array, Array, Plan]]:
    return combine(rows, weights, plan), (rows, weights, plan)


def _backward(saved: tuple[Array, Array, Plan], d_out: Array) -> tuple[Array, Array, None]:
    rows, weights, plan = saved
    per_token = plan.row.shape[1]
    # Padding rows have assignment S. They are clipped to a real one here and masked after it.
    filled = plan.assignment < plan.row.size
    row_weight = jnp.take(weights.reshape(-1), plan.assignment, mode="clip")
    row_weight = jnp.where(filled, row_weight, 0)[:, None]
    d_rows = row_weight * jnp.take(d_out, plan.assignment // per_token, axis=0, mode="clip")
    gathered = jnp.take(rows, plan.row, axis=0, mode="fill", fill_value=0)
    d_weights = jnp.einsum(
        "td,tkd->tk", d_out, gathered, preferred_element_type=wide(rows.dtype)
    ).astype(weights.dtype)
    return d_rows.astype(rows.dtype), d_weights, None  # the plan is integers


combine.defvjp(_forward, _backward)
