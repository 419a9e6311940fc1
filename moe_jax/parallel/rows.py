"""The rows of a global batch that one process reads, and arrays of all processes put together."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Int


def rows_of_process(sharding: Sharding, batch: int) -> Int[np.ndarray, "rows"]:
    """The rows of a batch of so many that this process's devices hold, ascending.

    `sharding` is that of the batch's arrays, whose first axis is the rows. Processes whose devices
    hold the same rows, as on an axis over which the batch is not split, read the same ones.
    """
    held = np.zeros(batch, bool)
    held_by_device: Any = sharding.addressable_devices_indices_map((batch,))
    for index in held_by_device.values():
        held[index] = True
    return np.flatnonzero(held)


def global_batch(sharding: Sharding, batch: int, rows: np.ndarray, local: Any) -> Any:
    """The arrays of a whole batch [B, …] on all processes, each of which gives its own rows.

    `local`: a tree of arrays [rows, …] with the rows that `rows_of_process` names, in that order.
    """

    def place(part: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(batch)
            # The rows of a device are consecutive in the batch, and so they are in `part`.
            first = int(np.searchsorted(rows, begin))
            return part[first : first + end - begin][(slice(None), *index[1:])]

        shape = (batch, *part.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(place, local)


def place_whole(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has alike on a device of its own, laid out by a tree of shardings.

    JAX would copy them from one process's device to another's, which CPUs cannot.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array: Any, sharding: Sharding) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)
