"""A forward and another micro-batch's backward in turns: the same values, in a fixed order."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.gradient_split import split
from moe_jax.parallel.mesh import own_copies

ORDER = ("all_to_all", "optimization_barrier")


def exchanged(p, x, c):
    """Rows go to the other device and come back. A small transfer goes along."""

    def swap(rows):
        return lax.all_to_all(rows, "expert", 0, 0, tiled=True)

    arrived = swap(x @ p["there"]) * (1 + swap(x[:, :1]))
    return x + swap(jnp.tanh(arrived @ p["here"])) + c, jnp.zeros(()), ()


def alone(p, x, c):
    return x + jnp.tanh(x @ p["there"]) @ p["here"] + c, jnp.zeros(()), ()


def programs(layer):
    """(p, x, c, dy) -> results one after the other, results in turns, and the latter's trace."""
    orders = []

    def local(p, x, c, dy):
        p = own_copies(p, ("expert",))
        parts = split(layer, p, x, c)
        (y, _, _), saved = parts.forward(p, x, c)
        dx, _ = parts.backward_input(p, c, saved, dy)
        both = jax.make_jaxpr(parts.overlapped)((p, x, c), (p, c, saved, dy))
        names = [equation.primitive.name for equation in both.eqns]
        orders.extend(name for name in names if name in ORDER)
        ((other, _, _), _), (d_other, _) = parts.overlapped((p, x, c), (p, c, saved, dy))
        return (y, dx), (other, d_other)

    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = P("expert")
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=rows)
    normal = (jax.random.normal(jax.random.key(i), (8, 16)) for i in range(2))
    p = {"there": jnp.eye(16) + 0.1, "here": jnp.eye(16) - 0.1}
    found = jax.jit(spread)(p, next(normal), jnp.ones((8, 1)), next(normal))
    return found, orders


def test_two_programs_take_turns_at_their_transfers():
    (one_after_another, in_turns), order = programs(exchanged)
    jax.tree.map(np.testing.assert_array_equal, one_after_another, in_turns)
    # Each sends two arrays in turns of its own, and a small one as it comes. The last barrier makes
    # the forward's last rows travel under the end of the backward.
    assert Counter(order) == {"all_to_all": 6, "optimization_barrier": 5}
    assert order[:2] == ["optimization_barrier", "all_to_all"]
    assert order[-1] == "optimization_barrier"


def test_programs_without_transfers_are_not_tied():
    (one_after_another, in_turns), order = programs(alone)
    jax.tree.map(np.testing.assert_array_equal, one_after_another, in_turns)
    assert not order
