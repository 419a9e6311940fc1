"""Root-mean-square normalisation."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float


# JAX's own derivative keeps three arrays in float32 for the backward pass. This one keeps x, which
# others need as well, and computes them again.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x²) + epsilon) · scale, computed in float32 (arXiv:1910.07467, eq. 4)."""
    return _normed(x, scale, epsilon)


def _normed(x: Array, scale: Array, epsilon: float) -> Array:
    # In bfloat16 the sum of D squares would keep 8 bits of its mantissa.
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def _forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    return _normed(x, scale, epsilon), (x, scale)


def _backward(epsilon: float, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    _, pull = jax.vjp(partial(_normed, epsilon=epsilon), *saved)
    d_x, d_scale = pull(d_out)
    return d_x, d_scale


rms_norm.defvjp(_forward, _backward)


class RMSNorm(nnx.Module):
    """rms_norm with a learned scale, one at the start."""

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(x, self.scale[...], self.epsilon)
