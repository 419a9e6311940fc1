"""The layers that are measured, and their arrays."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Shape(NamedTuple):
    """Sizes of one layer: T, D, F, E and K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int

    @property
    def flops(self) -> float:
        """FLOPs of a forward pass, 6 T K D F, without the router."""
        return 6.0 * self.tokens * self.per_token * self.width * self.hidden


def _sonic_grid() -> dict[str, Shape]:
    """SonicMoE's grid (arXiv:2512.14080): the same work in ever fewer and larger experts."""
    sizes = {  # T, D, and the smallest F with its E and K
        "1.4B": Shape(40960, 768, 256, 128, 8),
        "7B": Shape(24576, 1536, 256, 128, 8),
        "30B": Shape(32768, 4096, 256, 256, 16),
        "120B": Shape(32768, 4096, 512, 256, 16),
    }
    grid = {}
    for name, finest in sizes.items():
        for halvings in range(3):
            shape = finest._replace(
                hidden=finest.hidden << halvings,
                experts=finest.experts >> halvings,
                per_token=finest.per_token >> halvings,
            )
            grid[f"sonic {name} n={shape.hidden}"] = shape
    return grid


SONIC = _sonic_grid()
MODELS = {
    "OLMoE-1B-7B": Shape(8192, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(8192, 2048, 768, 128, 8),
    "DeepSeek-V2-Lite": Shape(8192, 2048, 1408, 64, 6),
    "Qwen1.5-MoE": Shape(8192, 2048, 1408, 60, 4),  # E is no power of two
    "gpt-oss-120b": Shape(8192, 2880, 2880, 128, 4),  # D is no power of two
    "Mixtral-8x7B": Shape(8192, 4096, 14336, 8, 2),
    "DeepSeek-V3": Shape(8192, 7168, 2048, 256, 8),
}
SHAPES = SONIC | MODELS


class Inputs(NamedTuple):
    """Arrays of a layer in one dtype."""

    x: Float[Array, "T D"]
    weights: Float[Array, "T K"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    experts: Int[Array, "T K"]
    d_out: Float[Array, "T D"]


@partial(jax.jit, static_argnums=(0, 1))
def make_inputs(shape: Shape, dtype: str, seed: int = 0) -> Inputs:
    """Normal numbers and a random routing, which is nearly balanced.

    They are drawn on the device: the largest array is gigabytes. Under jit no step of the drawing
    keeps an array of its own.
    """
    keys = jax.random.split(jax.random.key(seed), 6)
    t, d, f, e, k = shape
    experts = jax.lax.top_k(jax.random.normal(keys[4], (t, e)), k)[1]
    return Inputs(
        x=jax.random.normal(keys[0], (t, d), dtype),
        weights=jax.random.uniform(keys[1], (t, k)),
        # Divided by the root of the contraction, so that 16-bit results do not overflow.
        gate_up=jax.random.normal(keys[2], (e, d, 2 * f), dtype) / d**0.5,
        down=jax.random.normal(keys[3], (e, f, d), dtype) / f**0.5,
        experts=experts.astype(jnp.int32),
        d_out=jax.random.normal(keys[5], (t, d), dtype),
    )
