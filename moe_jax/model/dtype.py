"""The type of matrix products and activations, chosen for this machine where it is left open."""

import jax
import jax.numpy as jnp

from moe_jax.base.machine import compute_capability
from moe_jax.config import ModelConfig

BFLOAT16_CAPABILITY = 8.0
"""Ampere: the first compute capability whose matrix units multiply bfloat16."""


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type that `model.compute_dtype` stands for here.

    `auto` is bfloat16 on TPUs and on NVIDIA GPUs whose matrix units multiply it, and float32
    anywhere else. A T4 or V100 gets float32: it has no bfloat16 products, and training in float16
    needs a loss scale, which does not exist here. A type named explicitly is never replaced.
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype("bfloat16" if multiplies_bfloat16() else "float32")


def slow_type(config: ModelConfig) -> str:
    """A line for a GPU without matrix units for bfloat16 that was told to use it, or nothing."""
    if config.compute_dtype != "bfloat16" or multiplies_bfloat16():
        return ""
    capability = compute_capability()
    if capability is None:
        return ""
    return (
        f"model.compute_dtype=bfloat16 is kept. This GPU has compute capability {capability} and "
        "no bfloat16 products: values are rounded to bfloat16, and multiplied in float32 (auto is "
        "float32 here)"
    )


def multiplies_bfloat16() -> bool:
    """Whether the first device has matrix units for bfloat16."""
    if jax.default_backend() == "tpu":
        return True
    capability = compute_capability()
    return capability is not None and capability >= BFLOAT16_CAPABILITY
