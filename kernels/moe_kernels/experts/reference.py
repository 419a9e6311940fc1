"""The specification in plain jnp: every assignment alone, sums in float32."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    experts: Int[Array, "T K"],
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · (silu(x gate[e]) · x up[e]) down[e], e = experts[t, k].

    Everything in float32 whatever the inputs; it holds a matrix for each assignment, so it is for
    small sizes. An expert E is nobody and adds nothing.
    """
    x, weights, gate_up, down = (a.astype(jnp.float32) for a in (x, weights, gate_up, down))
    real = experts < gate_up.shape[0]
    chosen = jnp.where(real, experts, 0)
    highest = jax.lax.Precision.HIGHEST
    z = jnp.einsum("td,tkdf->tkf", x, gate_up[chosen], precision=highest)
    gate, up = jnp.split(z, 2, axis=-1)
    y = jnp.einsum("tkf,tkfd->tkd", jax.nn.silu(gate) * up, down[chosen], precision=highest)
    return jnp.sum(jnp.where(real, weights, 0.0)[..., None] * y, axis=1)
