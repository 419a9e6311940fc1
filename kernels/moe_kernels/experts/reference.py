"""The specification in plain jnp: every assignment by itself, sums in float32."""

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

    Everything is in float32 whatever the inputs' dtypes. An assignment to E has no expert and adds
    nothing. It holds a matrix for each assignment, so it is for small sizes.
    """
    x, weights, gate_up, down = (a.astype(jnp.float32) for a in (x, weights, gate_up, down))
    has_expert = experts < gate_up.shape[0]
    chosen = jnp.where(has_expert, experts, 0)
    # On a GPU or TPU the default precision would multiply in TF32 or bfloat16.
    highest = jax.lax.Precision.HIGHEST
    z = jnp.einsum("td,tkdf->tkf", x, gate_up[chosen], precision=highest)
    gate, up = jnp.split(z, 2, axis=-1)
    y = jnp.einsum("tkf,tkfd->tkd", jax.nn.silu(gate) * up, down[chosen], precision=highest)
    return jnp.sum(jnp.where(has_expert, weights, 0.0)[..., None] * y, axis=1)
