"""The dense SwiGLU feed-forward: the first blocks, and the shared experts of the others."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.model.linear import Linear
from moe_jax.moe.experts import swiglu


class FeedForward(nnx.Module):
    """y = swiglu(x W1) W2 (arXiv:2002.05202, eq. 6), W1 being the gate and up matrices in one."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.gate_up = Linear(width, 2 * hidden, std=std, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, std=out_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(swiglu(self.gate_up(x)))
