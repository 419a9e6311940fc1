"""The gradients of rows through one expert, and the sums that a loop over experts keeps of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.moe.experts import swiglu
from moe_jax.moe.precision import wide


class Gradients(NamedTuple):
    """The gradients of a set of rows, and of the matrices that they were multiplied by."""

    x: Float[Array, "*rows D"]
    weight: Float[Array, "*rows"]
    gate_up: Float[Array, "*experts D twoF"]
    down: Float[Array, "*experts F D"]


def pull_rows(
    x_t: Array,
    z: Array,
    d_out: Array,
    weight: Array,
    gate_up: Array,
    down: Array,
    *,
    sums_in: Any = None,
) -> Gradients:
    """The gradients of weight · (swiglu(z) down), where z = x gate_up, from the cotangent d_out.

    x_t is x transposed. Leading axes are those of the batch [E, C, …], or none in a turn [n, …].
    The matrices' gradients are of the dtype `sums_in`, by default x's.
    """
    weight = weight[..., None].astype(z.dtype)
    d_hidden = jnp.einsum("...cd,...fd->...cf", d_out, down)
    hidden, pull = jax.vjp(swiglu, z)
    (dz,) = pull(weight * d_hidden)
    # The weight's gradient, d_out · y with y = hidden down, equals d_hidden · hidden. So y need not
    # be kept.
    return Gradients(
        x=jnp.einsum("...cf,...df->...cd", dz, gate_up),
        weight=jnp.sum(d_hidden * hidden, axis=-1, dtype=wide(z.dtype)),
        gate_up=jnp.matmul(x_t, dz, preferred_element_type=sums_in),
        down=jnp.einsum(
            "...cf,...cd->...fd", weight * hidden, d_out, preferred_element_type=sums_in
        ),
    )


class Totals(NamedTuple):
    """The gradients that the loop adds to."""

    sums: Gradients
    """x [T, D] and weight [S] in float32, the matrices' gradients as they are returned."""
    expert: Int[Array, ""]
    """The expert of the last turn."""
    gate_up: Float[Array, "D twoF"]
    """That expert's gradients in float32. Zeros where the matrices are float32 themselves."""
    down: Float[Array, "F D"]


def add_to_matrices(totals: Totals, expert: Array, d: Gradients) -> Totals:
    """totals with a turn's gradients of one expert's matrices.

    The turns of an expert follow each other. Their sum is kept in float32 and written after each
    turn, so an expert is rounded once in each loop, and not once a turn.
    """
    sums = totals.sums
    if sums.gate_up.dtype == wide(sums.gate_up.dtype):
        gate_up = sums.gate_up.at[expert].add(d.gate_up)
        return totals._replace(
            sums=sums._replace(gate_up=gate_up, down=sums.down.at[expert].add(d.down))
        )
    same = expert == totals.expert

    def extended(sum_of_expert: Array, written: Array, turn: Array) -> Array:
        before = jnp.where(same, sum_of_expert, written[expert].astype(sum_of_expert.dtype))
        return before + turn

    gate_up = extended(totals.gate_up, sums.gate_up, d.gate_up)
    down = extended(totals.down, sums.down, d.down)
    sums = sums._replace(
        gate_up=sums.gate_up.at[expert].set(gate_up.astype(sums.gate_up.dtype)),
        down=sums.down.at[expert].set(down.astype(sums.down.dtype)),
    )
    return Totals(sums, expert, gate_up, down)
