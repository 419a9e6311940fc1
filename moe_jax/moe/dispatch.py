"""Step 3: copies every token's vector to the rows of its experts."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.moe.plan import Plan
from moe_jax.moe.precision import wide


@jax.custom_vjp
def dispatch(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """rows[r] = x[token of row r], and 0 in padding rows.

    The gradient is the unweighted combine, dx[t] = sum_k d rows[row[t, k]]. It gathers where
    autodiff would scatter, because XLA:CPU runs scatters one element at a time.
    """
    per_token = plan.row.shape[1]
    # Assignments are numbered t·K + k. Padding rows have S, which is clipped and then masked.
    filled = plan.assignment < plan.row.size
    rows = jnp.take(x, plan.assignment // per_token, axis=0, mode="clip")
    return jnp.where(filled[:, None], rows, 0)


def _forward(x: Array, plan: Plan) -> tuple[Array, Plan]:
    return dispatch(x, plan), plan


def _backward(plan: Plan, d_rows: Array) -> tuple[Array, None]:
    gathered = jnp.take(d_rows, plan.row, axis=0, mode="fill", fill_value=0)  # [T, K, D]
    return gathered.astype(wide(d_rows.dtype)).sum(axis=1).astype(d_rows.dtype), None


dispatch.defvjp(_forward, _backward)
