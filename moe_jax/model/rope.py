"""Rotary position embedding (arXiv:2104.09864), with the halves of a head as the rotated pairs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Rotation(NamedTuple):
    """cos and sin of every token's angles, computed once for all layers.

    XLA's CPU backend computes them slowly, and repeats the work wherever it fuses them into a user.
    """

    cos: Float[Array, "B L W"]
    sin: Float[Array, "B L W"]


def rotation(positions: Int[Array, "B L"], width: int, base: float) -> Rotation:
    """cos and sin, in float32, of the angles positions · base^(-2i/width) for i = 0 … W - 1.

    W = width/2.
    """
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B L H R"], by: Rotation) -> Float[Array, "B L H R"]:
    """Rotates the pair (x[i], x[i + R/2]) of every head by the token's i-th angle; R = 2W."""
    cos = by.cos[:, :, None, :]
    sin = by.sin[:, :, None, :]
    # In float32, because the 8 bits of bfloat16 would round neighbouring angles to the same cos.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
