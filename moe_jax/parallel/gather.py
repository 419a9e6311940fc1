"""A split array made whole inside a shard_map, whose gradient is summed in a dtype of choice."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import BATCH, TENSOR, manual_axes, own_copies

Axes = tuple[tuple[str, ...], ...]
"""The axes of the mesh over which each dimension of an array is split, the outermost first."""


class _Way(NamedTuple):
    """How an array is gathered: hashable, as custom_vjp wants its static arguments."""

    dimensions: Axes
    """The axes of the mesh over which each dimension is gathered."""
    others: tuple[str, ...]
    """The axes on which every device has the same part."""
    dtype: jnp.dtype
    gradient: jnp.dtype


def sum_dtype(compute: jnp.dtype, gradient: str) -> jnp.dtype:
    """The dtype in which a gradient is summed (ModelConfig.gradient_dtype)."""
    return compute if gradient == "compute" else jnp.promote_types(compute, gradient)


def gather(
    part: Array, spec: P, dtype: jnp.dtype, gradient: jnp.dtype, keep: tuple[str, ...] = ()
) -> Array:
    """The whole array in `dtype`, of which `spec` gives each device a part.

    Parts are cast before they are sent. The gradient of the whole is each device's own. It is cast
    to `gradient` and summed over all axes that share the work of a layer. A dimension stays split
    over the axes in `keep`, which must come first in its dimension.
    """
    names = axes_of(spec)
    split = {axis for axes in names for axis in axes}
    # Not the axis of a pipeline: outside of its schedule all its devices compute the same.
    others = tuple(a for a in (*BATCH, TENSOR) if a in manual_axes() and a not in split)
    dimensions = tuple(tuple(axis for axis in axes if axis not in keep) for axes in names)
    return _gather(part, _Way(dimensions, others, jnp.dtype(dtype), jnp.dtype(gradient)))


def axes_of(spec: P) -> Axes:
    """The axes of each dimension."""
    return tuple((axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec)


def join(part: Array, dimensions: Axes) -> Array:
    """The array whose dimensions are split over these axes, whole on each of their devices."""
    for dimension, axes in enumerate(dimensions):
        if axes:
            part = lax.all_gather(part, axes, axis=dimension, tiled=True)
    return part


def split(whole: Array, dimensions: Axes) -> Array:
    """This device's part of the sum over devices: the transpose of `join`."""
    for dimension, axes in enumerate(dimensions):
        if axes:
            whole = lax.psum_scatter(whole, axes, scatter_dimension=dimension, tiled=True)
    return whole


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(part: Array, way: _Way) -> Array:
    return _forward(part, way)[0]


def _forward(part: Array, way: _Way) -> tuple[Array, Array]:
    whole = join(part.astype(way.dtype), way.dimensions)
    # Marked as each device's own, because each gives its own part of the gradient.
    return own_copies(whole, way.others), jnp.zeros((), part.dtype)


def _backward(way: _Way, like: Array, whole: Array) -> tuple[Array]:
    # Summed and split in one go, so that the sum over the other axes has less to send.
    part = split(whole.astype(way.gradient), way.dimensions)
    if way.others:
        part = lax.psum(part, way.others)
    return (part.astype(like.dtype),)


_gather.defvjp(_forward, _backward)
