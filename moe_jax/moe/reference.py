"""The reference implementation of steps 3 to 5: dispatch -> experts -> combine."""

from jax import Array
from jaxtyping import Float

from moe_jax.moe.combine import combine
from moe_jax.moe.dispatch import dispatch
from moe_jax.moe.experts import grouped_swiglu
from moe_jax.moe.plan import Plan


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · swiglu(x[t] gate_up[e]) down[e], e the k-th expert of t.

    The fast implementations are compared with it. For the backward pass it keeps the output of
    every step, and for every block a copy of its expert's matrices.
    """
    rows = grouped_swiglu(dispatch(x, plan), gate_up, down, plan)
    return combine(rows, weights, plan)
