"""The linear map that every projection is."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.base.initial import normal_parameter


class Linear(nnx.Module):
    """y = x W without bias. W is [I, O] and is cast to the dtype of x.

    I is the width of the input, O that of the output.
    """

    def __init__(
        self, inputs: int, outputs: int, *, std: float, dtype: jnp.dtype, key: Array
    ) -> None:
        self.weight = normal_parameter(key, (inputs, outputs), std, dtype)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return x @ self.weight[...].astype(x.dtype)
