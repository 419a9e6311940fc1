"""Rotary position embedding (arXiv:2104.09864), with the halves of a head as the rotated pairs."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config.attention import YarnConfig

UNSCALED = YarnConfig()


class Rotation(NamedTuple):
    """cos and sin of every token's angles, computed once for all layers.

    XLA's CPU backend computes them slowly, and repeats the work wherever it fuses them into a user.
    """

    cos: Float[Array, "B L pairs"]
    sin: Float[Array, "B L pairs"]


def rotation(
    positions: Int[Array, "B L"], width: int, base: float, yarn: YarnConfig = UNSCALED
) -> Rotation:
    """cos and sin, in float32, of the angles positions · frequencies(width, base, yarn).

    pairs = width/2. Both are multiplied by yarn.rotary_factor.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(width, base, yarn)
    cos = jnp.cos(angles)
    sin = jnp.sin(angles)
    if yarn.factor == 1:
        return Rotation(cos, sin)
    return Rotation(cos * yarn.rotary_factor, sin * yarn.rotary_factor)


def frequencies(width: int, base: float, yarn: YarnConfig = UNSCALED) -> Float[Array, "pairs"]:
    """f_i = base^(-2i/width) for i = 0 … pairs - 1, in float32.

    With YaRN, f_i · (1 - r_i) + f_i / factor · r_i (arXiv:2309.00071, §3.2). The ramp r_i rises
    from 0 to 1 between the pairs that turn beta_fast and beta_slow times in original_length.
    """
    plain = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if yarn.factor == 1:
        return plain

    def pair_with(turns: float) -> float:
        """i with original_length · f_i = 2π · turns."""
        wavelengths = yarn.original_length / (2 * math.pi * turns)
        return width * math.log(wavelengths) / (2 * math.log(base))

    # Rounded outwards and cut to width - 1, as in the published code. The cut is not to pairs - 1.
    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    # 0.001 where both are one pair: a step.
    ramp = jnp.clip((jnp.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def rotate(x: Float[Array, "B L H rope_dim"], by: Rotation) -> Float[Array, "B L H rope_dim"]:
    """Rotates the pair (x[i], x[i + pairs]) of every head by the token's i-th angle.

    rope_dim = 2·pairs.
    """
    # [B, L, 1, pairs]: the same angles for every head.
    cos = by.cos[:, :, None, :]
    sin = by.sin[:, :, None, :]
    # In float32, because the 8 bits of bfloat16 would round neighbouring angles to the same cos.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
