"""The dense SwiGLU feed-forward, used by dense blocks and as the shared experts of sparse ones."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.base.initial import named_key
from moe_jax.model.linear import Linear
from moe_jax.moe.experts import swiglu


class FeedForward(nnx.Module):
    """y = swiglu(x W1) W2 (arXiv:2002.05202, eq. 6).

    W1 holds the gate matrix and the up matrix side by side, so that one product computes both.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        key: Array,
    ) -> None:
        up_key = named_key(key, "gate_up")
        self.gate_up = Linear(width, 2 * hidden, std=std, dtype=dtype, key=up_key)
        self.down = Linear(hidden, width, std=out_std, dtype=dtype, key=named_key(key, "down"))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(swiglu(self.gate_up(x)))
