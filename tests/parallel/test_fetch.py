"""Experts fetched to the devices' slots, and the gradients of replicas summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import UserError
from moe_jax.parallel.fetch import fetch

E, D, F = 4, 6, 5
SLOTS = [2, 0, 1, 2, 3, 0, 2, 1]
"""Of two devices. Device 0 has expert 2 twice, which no plan does and fetching allows."""


def fetched(spec, slots=SLOTS):
    """(experts [E, D, F], direction [slots, D, F]) -> (matrices of all slots, their gradient)."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def local(part, direction):
        out, pull = jax.vjp(
            lambda p: fetch(p, jnp.array(slots), spec, jnp.float32, jnp.float32), part
        )
        return out, pull(direction)[0]

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(spec, P("expert")), out_specs=(P("expert"), spec))
    )


@pytest.mark.parametrize("slots", [SLOTS, [3, 1, 0, 2]], ids=["replicas", "no replicas"])
def test_each_slot_has_its_expert_and_gradients_of_replicas_add_up(slots):
    rng = np.random.default_rng(0)
    experts = rng.integers(-9, 9, (E, D, F)).astype(np.float32)  # whole numbers: sums are exact
    direction = rng.integers(-9, 9, (len(slots), D, F)).astype(np.float32)
    out, gradient = fetched(P(None, "expert"), slots)(experts, direction)
    np.testing.assert_array_equal(out, experts[slots])
    expected = np.zeros_like(experts)
    np.add.at(expected, slots, direction)
    np.testing.assert_array_equal(gradient, expected)


def test_experts_that_no_axis_splits_are_refused_by_name():
    with pytest.raises(UserError, match=r"parallel\.expert splits no dimension of experts \(4, 6"):
        fetched(P())(np.zeros((E, D, F)), np.zeros((len(SLOTS), D, F)))
