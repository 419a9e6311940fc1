"""The dense SwiGLU feed-forward, used by dense blocks and as the shared experts of sparse ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from moe_jax.base.initial import named_key
from moe_jax.base.recompute import recomputed
from moe_jax.model.linear import Linear, product
from moe_jax.moe.experts import swiglu
from moe_jax.parallel.mesh import TENSOR, axis_sizes


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
        gradient: str = "float32",
        key: Array,
    ) -> None:
        """`gradient`: see ModelConfig.gradient_dtype."""
        linear = partial(Linear, dtype=dtype, gradient=gradient)
        self.gate_up = linear(width, 2 * hidden, std=std, key=named_key(key, "gate_up"))
        self.down = linear(hidden, width, std=out_std, key=named_key(key, "down"))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        if TENSOR not in axis_sizes():
            # The result of a product alone is kept, and not what becomes of its halves.
            return self.down(recomputed(swiglu)(self.gate_up(x)))
        both: Any = product(x, self.gate_up.weight[...], self.gate_up.gradient, _halves)
        return self.down(_swiglu_of_halves(both))


@recomputed
def _swiglu_of_halves(both: Float[Array, "*batch 2 F"]) -> Float[Array, "*batch F"]:
    return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]


def _halves(gate_up: Float[Array, "D twoF"]) -> Array:
    """[D, 2, F] with F split over the tensor axis: a device has the same columns of both."""
    # In two steps, which the partitioner knows as a gather and an all-to-all.
    split = lax.with_sharding_constraint(gate_up, P(TENSOR))
    return lax.with_sharding_constraint(split.reshape(len(split), 2, -1), P(None, None, TENSOR))
