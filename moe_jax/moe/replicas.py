"""Which of its experts' replicas computes a token."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from moe_jax.moe.plan import Plan


def slots_of_experts(
    plan: Plan, slots: Int[Array, "slots"], first: Int[Array, ""] | int = 0
) -> Int[Array, "T K"]:
    """The slot that computes each assignment of a plan, or the number of slots for none.

    `slots` has the expert in each slot. Every expert has one at least. The n-th assignment of an
    expert goes to its replica (n + first) mod replicas, so that a device's tokens are spread
    evenly. Devices begin at different replicas (`first`), so that what does not divide is spread as
    well.
    """
    experts = len(plan.load)
    order = jnp.argsort(slots, stable=True)  # an expert's slots lie together in it
    ends = jnp.searchsorted(slots[order], jnp.arange(experts), side="right")
    replicas = jnp.diff(ends, prepend=0)
    expert = jnp.minimum(plan.experts, experts - 1)
    within = plan.row - plan.starts[expert]
    chosen = order[(ends - replicas)[expert] + (within + first) % replicas[expert]]
    return jnp.where(plan.experts < experts, chosen, len(slots)).astype(plan.experts.dtype)
