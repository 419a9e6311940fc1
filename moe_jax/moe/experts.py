"""Step 4: every block of rows goes through the SwiGLU of its expert."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.moe.plan import Plan


def swiglu(gate_up: Float[Array, "*batch twoF"]) -> Float[Array, "*batch F"]:
    """silu(gate) · up, where gate_up holds the gate half and then the up half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def expert_output(
    x: Float[Array, "T D"], gate_up: Float[Array, "D twoF"], down: Float[Array, "F D"]
) -> Float[Array, "T D"]:
    """swiglu(x gate_up) down of one expert, computed in x's dtype and returned in float32."""
    y = swiglu(x @ gate_up.astype(x.dtype)) @ down.astype(x.dtype)
    return y.astype(jnp.float32)


def grouped_swiglu(
    rows: Float[Array, "R D"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
) -> Float[Array, "R D"]:
    """y[r] = swiglu(rows[r] gate_up[e]) down[e] for the expert e of r's block.

    This is the reference. Each block gathers a copy of its expert's matrices, and all blocks are
    one batched product. Padding rows are 0 and stay 0.
    """
    # In the einsums, n is the block, r a row within it, and f runs over 2F before swiglu.
    blocks = rows.reshape(plan.block_expert.size, -1, rows.shape[-1])
    hidden = swiglu(jnp.einsum("nrd,ndf->nrf", blocks, gate_up[plan.block_expert]))
    return jnp.einsum("nrf,nfd->nrd", hidden, down[plan.block_expert]).reshape(rows.shape)
