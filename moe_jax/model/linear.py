"""The linear map that every projection is, and its initialisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float


def normal_param(key: Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> nnx.Param:
    """A parameter drawn from a normal distribution with standard deviation `std`."""
    return nnx.Param((std * jax.random.normal(key, shape, jnp.float32)).astype(dtype))


class Linear(nnx.Module):
    """y = x W without bias; W is [inputs, outputs] and is cast to the dtype of x."""

    def __init__(
        self, inputs: int, outputs: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.weight = normal_param(rngs.params(), (inputs, outputs), std, dtype)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        return x @ self.weight[...].astype(x.dtype)
