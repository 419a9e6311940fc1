"""Devices as a mesh, and sums over its data axis."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array, lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

DATA = "data"
Tree = TypeVar("Tree")


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh whose `data` axis holds all devices of all processes, or the first `devices`."""
    chosen = jax.devices()[:devices]  # [:None] takes all of them
    # Auto: the partitioner lays out everything outside map_over_data.
    return jax.make_mesh((len(chosen),), (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def data_parallel() -> int:
    """Size of the data axis of the mesh in force (jax.set_mesh). 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(DATA, 1)


def map_over_data(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """function(batch, parameters) on each device's rows of the batch.

    `function` returns a pair (arrays [B, …], summary that is equal on all devices). Gradients of
    the parameters are summed over devices. Sorting and gathering stay local, where the partitioner
    would replicate them. Without a mesh the result is `function` itself.
    """
    if data_parallel() == 1:
        return function

    def local(batch: Any, shared: Any) -> Any:
        # Marked as each device's own, so that a custom_vjp may return its device's part of their
        # gradient. The transpose of the mark is the sum over devices.
        return function(batch, jax.tree.map(lambda a: lax.pcast(a, DATA, to="varying"), shared))

    return jax.shard_map(
        local, in_specs=(P(DATA), P()), out_specs=(P(DATA), P()), axis_names={DATA}
    )


def sum_over_data(tree: Tree) -> Tree:
    """Inside map_over_data: the sum over all devices' shares of the batch."""
    return tree if data_parallel() == 1 else lax.psum(tree, DATA)


def own_key(key: Array | None) -> Array | None:
    """Inside map_over_data: a key of this device's own, so that devices draw differently."""
    if key is None or data_parallel() == 1:
        return key
    return jax.random.fold_in(key, lax.axis_index(DATA))
