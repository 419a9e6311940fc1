"""Root-mean-square normalisation."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from moe_jax.base.recompute import recomputed


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x²) + epsilon) · scale, computed in float32 (arXiv:1910.07467, eq. 4)."""

    def normed(x: Array, scale: Array) -> Array:
        # In bfloat16 the sum of D squares would keep 8 bits of its mantissa.
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)

    # Three arrays in float32 would be kept otherwise.
    return recomputed(normed)(x, scale)


class RMSNorm(nnx.Module):
    """rms_norm with a learned scale, one at the start."""

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(x, self.scale[...], self.epsilon)
