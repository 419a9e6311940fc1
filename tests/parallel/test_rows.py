"""The rows that a process reads, on meshes whose devices belong to made-up processes."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.rows import global_batch, rows_of_process


class Held:
    """A sharding of which this process's devices hold the given rows."""

    def __init__(self, *held: slice):
        self.held = held

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, Any]:
        return {device: (rows,) for device, rows in enumerate(self.held)}


@pytest.mark.parametrize(
    ("held", "rows"),
    [
        ([slice(0, 2), slice(2, 4)], [0, 1, 2, 3]),
        ([slice(6, 8), slice(2, 4)], [2, 3, 6, 7]),
        ([slice(4, 6), slice(4, 6)], [4, 5]),  # two devices of a tensor axis
        ([slice(None)], list(range(8))),
    ],
)
def test_rows_of_all_devices_once_and_in_order(held, rows):
    sharding: Any = Held(*held)
    assert rows_of_process(sharding, 8).tolist() == rows


def test_a_batch_split_over_one_axis_and_whole_on_another():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 1), ("rows", "other"))
    batch = {"tokens": np.arange(24).reshape(4, 6), "log_p": np.arange(24.0).reshape(4, 2, 3)}
    for spec in (P("rows"), P("other"), P(("rows", "other"))):
        sharding = NamedSharding(mesh, spec)
        rows = rows_of_process(sharding, 4)
        placed = global_batch(sharding, 4, rows, jax.tree.map(lambda a: a[rows], batch))  # noqa: B023
        for name, array in placed.items():
            np.testing.assert_array_equal(array, batch[name])
            assert array.sharding == sharding
