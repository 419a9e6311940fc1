"""Initial values of parameters, and random keys that are derived by name."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.base.seeds import check_seed


def root_key(seed: int) -> Array:
    """The key of a seed, from which all others are derived. UserError: the seed does not exist."""
    check_seed("seed", seed)
    return jax.random.key(seed)


def named_key(key: Array, *path: str | int | Array) -> Array:
    """The key of the part called `path` below the owner of `key`: jax.random.fold_in for each name.

    A part's draws depend on its own path alone, and on no draw that was made before it. So a layer
    or an expert can be drawn again by itself. Names enter by their CRC-32, layers by their index
    (which may be traced).
    """
    for name in path:
        number: Any = zlib.crc32(name.encode()) if isinstance(name, str) else name
        key = jax.random.fold_in(key, number)
    return key


def layer_keys(key: Array, layers: int) -> Array:
    """named_key(key, layer) for every layer, stacked."""
    return jax.vmap(lambda layer: named_key(key, layer))(jnp.arange(layers))


def normal_parameter(key: Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> nnx.Param:
    """A parameter drawn from a normal distribution with mean 0 and standard deviation `std`."""
    return nnx.Param((std * jax.random.normal(key, shape, jnp.float32)).astype(dtype))
