"""The specification in plain jnp: FP8 operands, float32 sums, every assignment by itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_kernels.quantise.reference import round_matrices, round_rows


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    experts: Int[Array, "T K"],
    power_of_two: bool = False,
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · q(a) q(down[e]), a = swiglu(q(x[t]) q(gate_up[e])).

    q rounds as the quantiser does: tiles of 128 of x and of a, blocks of 128x128 of the matrices.
    Gradients are straight-through, also those of the weights. They are gradients of the same
    formula without q, at the z = q(x) q(gate_up) of the forward pass. It is for small sizes, as
    experts.reference.
    """
    x, weights, gate_up, down = (a.astype(jnp.float32) for a in (x, weights, gate_up, down))
    has_expert = experts < gate_up.shape[0]
    chosen = jnp.where(has_expert, experts, 0)
    highest = jax.lax.Precision.HIGHEST

    def first(x: Array, matrices: Array) -> Array:
        return jnp.einsum("td,tkdf->tkf", x, matrices[chosen], precision=highest)

    def second(hidden: Array, matrices: Array, weights: Array) -> Array:
        y = jnp.einsum("tkf,tkfd->tkd", hidden, matrices[chosen], precision=highest)
        return jnp.sum(jnp.where(has_expert, weights, 0.0)[..., None] * y, axis=1)

    rounded = (round_rows(x, power_of_two), round_matrices(gate_up, 2, power_of_two))
    z = _straight_through(first, (x, gate_up), rounded)
    gate, up = jnp.split(z, 2, axis=-1)
    hidden = jax.nn.silu(gate) * up
    flat = round_rows(hidden.reshape(-1, hidden.shape[-1]), power_of_two)
    rounded = (flat.reshape(hidden.shape), round_matrices(down, 1, power_of_two))
    return _straight_through(second, (hidden, down, weights), (*rounded, weights))


def _straight_through(
    product: Callable[..., Array], operands: tuple[Array, ...], rounded: tuple[Array, ...]
) -> Array:
    """product(rounded) with the gradients of product(operands)."""
    # The difference is a constant of the gradient, so the exact product's slopes remain.
    exact = product(*operands)
    return exact + jax.lax.stop_gradient(product(*rounded) - exact)
