"""Devices as a mesh with named axes, and sums over those axes that share the batch."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Num

from moe_jax.config import ParallelConfig

EXPERT = "expert"
BATCH = ("data", "fsdp", EXPERT)
"""Axes over which the rows of a batch are split, outermost first."""
TENSOR = "tensor"
AXES = ("pipe", *BATCH, TENSOR)
"""All axes. Neighbouring devices are neighbours on the last one, which sends the most."""
Tree = TypeVar("Tree")


def make_mesh(config: ParallelConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these settings over all devices of all processes, or over `devices`.

    `devices` may be those of a topology that is only compiled for. UserError: the axes do not fill
    them.
    """
    chosen = jax.devices() if devices is None else list(devices)
    sizes = (config or ParallelConfig()).sizes(len(chosen))
    shape = tuple(sizes[axis] for axis in AXES)
    # Auto: the partitioner lays out everything outside of shard_map.
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=chosen)


def axis_sizes() -> dict[str, int]:
    """The axes above 1 of the mesh in force (jax.set_mesh), without those of a shard_map around."""
    return _axes(AxisType.Auto)


def free_axes() -> set[str]:
    """All axes of the mesh in force, those of size 1 too, without those of a shard_map around.

    A shard_map should take all of them. Within one of some axes alone JAX 0.10 cannot trace
    jnp.searchsorted.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}


def batch_axes() -> tuple[str, ...]:
    """The axes above 1 over which the partitioner splits the rows of a batch here."""
    return tuple(axis for axis in BATCH if axis in axis_sizes())


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def manual_axes() -> dict[str, int]:
    """Inside a shard_map: its axes above 1."""
    return _axes(AxisType.Manual)


def _axes(kind: AxisType) -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, own in sizes if own == kind and size > 1}


def _shared_axes() -> tuple[str, ...]:
    return tuple(axis for axis in BATCH if axis in manual_axes())


def by_rows(x: Num[Array, "B *shape"]) -> Num[Array, "B *shape"]:
    """x with its rows split over the batch's axes, and nothing else of it."""
    axes = batch_axes()
    # A few rows that do not divide are of no training batch.
    fits = axes and len(x) % math.prod(axis_sizes()[axis] for axis in axes) == 0
    return lax.with_sharding_constraint(x, P(axes)) if fits else x


def sum_over_batch(tree: Tree) -> Tree:
    """Inside a shard_map: the sum over all devices' rows. Anywhere else the tree itself."""
    axes = _shared_axes()
    return lax.psum(tree, axes) if axes else tree


def sum_over_earlier(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """Inside a shard_map: the sum over the devices whose rows come before. Anywhere else 0."""
    axes = _shared_axes()
    if not axes:
        return jnp.zeros_like(x)
    everyone = lax.all_gather(x, axes)  # [devices, ...]
    earlier = jnp.arange(len(everyone)) < lax.axis_index(axes)
    return jnp.where(earlier.reshape(-1, *[1] * x.ndim), everyone, 0).sum(axis=0, dtype=x.dtype)


def gather_rows(tree: Tree) -> Tree:
    """Inside a shard_map: the rows of all devices, in order. Anywhere else the tree itself."""
    axes = _shared_axes()
    return lax.all_gather(tree, axes, tiled=True) if axes else tree


def own_rows(x: Num[Array, "B *shape"]) -> Num[Array, "B *shape"]:
    """The inverse of gather_rows: this device's rows."""
    axes = _shared_axes()
    if not axes:
        return x
    rows = len(x) // shared_by()
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * rows, rows)


def own_draw(
    draw: Callable[[tuple[int, ...]], Num[Array, "..."]], shape: tuple[int, ...]
) -> Num[Array, "..."]:
    """This device's rows, of this shape, of one draw for the rows of all devices.

    So what is drawn does not depend on how many devices share the batch.
    """
    return own_rows(draw((shape[0] * shared_by(), *shape[1:])))


def shared_by() -> int:
    """Inside a shard_map: the devices that share the batch. Anywhere else 1."""
    return math.prod(manual_axes()[axis] for axis in _shared_axes())


def varying_axes(array: Any) -> frozenset[str]:
    """Inside a shard_map: the axes over which devices may have different values of an array.

    The array may be a shape.
    """
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    return frozenset() if kind.manual_axis_type is None else kind.manual_axis_type.varying


def own_copies(tree: Tree, axes: Iterable[str]) -> Tree:
    """The tree with every leaf marked as the device's own over `axes` (lax.pcast)."""

    def own(leaf: Array) -> Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(own, tree)


def all_at_once(tree: Tree) -> Tree:
    """The tree, of which nothing can be used before all of it is there.

    JAX gives the values of an optimization barrier one type. Inside a shard_map those in which
    fewer devices differ than in others have no part in it.
    """
    leaves, structure = jax.tree.flatten(tree)
    most = max(len(varying_axes(leaf)) for leaf in leaves)
    places = [i for i, leaf in enumerate(leaves) if len(varying_axes(leaf)) == most]
    barrier = lax.optimization_barrier([leaves[i] for i in places])
    for i, leaf in zip(places, barrier, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def largest(x: Array, axes: Iterable[str] | None = None) -> Array:
    """Inside a shard_map: the largest value of all devices of `axes`, by default of all.

    What is the same on all of them stays, and its type then says so.
    """
    differing = varying_axes(x)
    # Sorted, so that all processes trace the same program.
    over = tuple(sorted(differing if axes is None else differing.intersection(axes)))
    return lax.pmax(x, over) if over else x


def carry_like(start: Tree, *arrays: Array) -> Tree:
    """The start of a loop's carry, marked as the arrays are that the loop adds to it.

    Inside a shard_map JAX wants a carry of one type. Anywhere else this is `start`.
    """
    return own_copies(start, frozenset().union(*map(varying_axes, arrays)))
