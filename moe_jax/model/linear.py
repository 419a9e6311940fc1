"""The linear map that every projection is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from moe_jax.base.initial import normal_parameter
from moe_jax.parallel.gather import sum_dtype

PRODUCT = "product"
"""Name of what `product` gives, for policies of jax.checkpoint. They do not look inside of a
custom_vjp."""


class Linear(nnx.Module):
    """y = x W without bias. W is [I, O] and is cast to the dtype of x.

    I is the width of the input, O that of the output.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        std: float,
        dtype: jnp.dtype,
        gradient: str = "float32",
        key: Array,
    ) -> None:
        """`gradient`: see ModelConfig.gradient_dtype."""
        self.weight = normal_parameter(key, (inputs, outputs), std, dtype)
        self.gradient = gradient

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return product(x, self.weight[...], self.gradient)


def _as_it_is(weight: Array) -> Array:
    return weight


def product(
    x: Float[Array, "*batch inputs"],
    weight: Float[Array, "inputs outputs"],
    gradient: str,
    arrange: Callable[[Array], Array] = _as_it_is,
) -> Array:
    """x W [*batch, outputs], computed in the dtype of x.

    The gradient of W is summed over rows, and over devices, in the dtype `gradient`. "compute" is
    the dtype of x. `arrange` is applied to W after its cast. It may give another layout, or another
    shape [inputs, ...], which is then that of the outputs.
    """
    result: Any = _product(x, weight, gradient, arrange)
    return checkpoint_name(result, PRODUCT)


# The derivative is JAX's own but for the type of the weight's gradient. JAX rounds it to the type
# of x, and XLA then sums it over devices in that type.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: Array, gradient: str, arrange: Callable[[Array], Array]) -> Array:
    return jnp.tensordot(x, arrange(weight.astype(x.dtype)), axes=1)


def _forward(
    x: Array, weight: Array, gradient: str, arrange: Callable[[Array], Array]
) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, weight, gradient, arrange), (x, weight)


def _backward(
    gradient: str,
    arrange: Callable[[Array], Array],
    saved: tuple[Array, Array],
    d_out: Array,
) -> tuple[Array, Array]:
    x, weight = saved
    arranged = arrange(weight.astype(x.dtype))
    batch = tuple(range(x.ndim - 1))
    outputs = (tuple(range(x.ndim - 1, d_out.ndim)), tuple(range(1, arranged.ndim)))
    d_x = jnp.tensordot(d_out, arranged, axes=outputs)
    wide = sum_dtype(x.dtype, gradient)
    d_arranged = jnp.tensordot(x, d_out, axes=(batch, batch), preferred_element_type=wide)
    # Of the weight itself and not of its shape: inside a shard_map the type says where it differs.
    _, back = jax.vjp(arrange, weight.astype(wide))
    return d_x, back(d_arranged)[0].astype(weight.dtype)


_product.defvjp(_forward, _backward)
