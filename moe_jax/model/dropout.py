"""Dropout (JMLR 15:1929, 2014)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.parallel.mesh import own_draw


def dropout(x: Float[Array, "*shape"], rate: float, key: Array | None) -> Float[Array, "*shape"]:
    """x · b / (1 - rate), where each b is 1 with probability 1 - rate, and else 0.

    The expectation is x. Without a key (outside training) or at rate 0 the result is x itself.
    """
    if rate == 0 or key is None:
        return x
    kept = own_draw(partial(jax.random.bernoulli, key, 1 - rate), x.shape)
    return jnp.where(kept, x / (1 - rate), 0)
