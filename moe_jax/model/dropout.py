"""Dropout (JMLR 15:1929, 2014)."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def dropout(x: Float[Array, "*shape"], rate: float, key: Array | None) -> Float[Array, "*shape"]:
    """x · b / (1 - rate), where each b is 1 with probability 1 - rate, and else 0.

    The expectation is x. Without a key (outside training) or at rate 0 the result is x itself.
    """
    if rate == 0 or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
