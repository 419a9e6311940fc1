"""Transfers: where every row goes, and that each is the transpose of its way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import UserError
from moe_jax.config import ExchangeConfig, MoEConfig, ParallelConfig
from moe_jax.parallel.exchange import (
    Level,
    all_to_all,
    exchange_in_force,
    exchanging,
    gather,
    reduce,
    shift,
)

PAIR = Level("expert", 2)


def on_devices(function, x, devices=2):
    """function on each device's part of the rows of x."""
    mesh = jax.make_mesh(
        (devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    spec = P("expert")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))(x)


def test_block_g_of_device_h_becomes_block_h_of_device_g():
    x = jnp.arange(8.0).reshape(4, 2)  # device 0 has rows 0 and 1
    np.testing.assert_array_equal(on_devices(all_to_all(PAIR).there, x), x[jnp.array([0, 2, 1, 3])])


def test_shift_goes_to_the_next_device():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(on_devices(shift(PAIR, 1).there, x), [2, 3, 0, 1])
    np.testing.assert_array_equal(on_devices(shift(PAIR, 2).there, x), x)


TRANSFERS = {
    "all_to_all": all_to_all(PAIR),
    "shift": shift(PAIR, 1),
    "gather": (lambda x: gather(x, PAIR), lambda x: reduce(x, PAIR)),
    "reduce": (lambda x: reduce(x, PAIR), lambda x: gather(x, PAIR)),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_the_way_back_is_the_transpose(name):
    there, back = TRANSFERS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    y, pull = jax.vjp(lambda x: on_devices(there, x), x)
    d = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32)
    np.testing.assert_allclose(pull(d)[0], on_devices(back, d), rtol=1e-6)


MOE = MoEConfig(experts=8, groups=4)


def test_groups_of_two_nodes():
    """Devices 0 … 5 in nodes of 3: (0, 1, 2) and (3, 4, 5)."""
    assert Level("expert", 6, 3).groups == [[0, 3], [1, 4], [2, 5]]
    assert Level("expert", 6, 3, inside=True).groups == [[0, 1, 2], [3, 4, 5]]
    assert (Level("expert", 6, 3).size, Level("expert", 6, 3, inside=True).size) == (2, 3)


def test_the_exchange_in_force():
    assert exchange_in_force() == ExchangeConfig()
    with exchanging(ExchangeConfig("ring")):
        assert exchange_in_force().kind == "ring"
    assert exchange_in_force() == ExchangeConfig()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExchangeConfig("ring", chunks=2), "chunks=2 needs kind=all_to_all, not ring"),
        (lambda: ExchangeConfig(node=2), "node=2 needs kind=copies, not all_to_all"),
        (lambda: ExchangeConfig("weights", fp8=True), "fp8 needs kind=all_to_all, ring or copies"),
        (
            lambda: ExchangeConfig(buffer=0.0),
            "parallel.exchange.buffer is 0.0: it must be positive",
        ),
        (lambda: ExchangeConfig(chunks=3).check(MOE, 2), "chunks=3 does not divide the 4 experts"),
        (lambda: ExchangeConfig("copies", node=3).check(MOE, 4), "node=3 does not divide parallel"),
        (lambda: ExchangeConfig(replicas=4), "replicas=4 needs parallel.exchange.rebalance"),
        (lambda: ExchangeConfig(moves=4), "moves=4 needs parallel.exchange.rebalance"),
        (lambda: ExchangeConfig("weights", rebalance=9), "rebalance=9 needs tokens that travel"),
        (lambda: ExchangeConfig(rebalance=9).check(MOE, 1), "rebalance=9 needs several devices"),
        (
            lambda: ExchangeConfig(rebalance=9, replicas=3).check(MOE, 2),
            "replicas=3 does not divide over parallel.expert=2 devices",
        ),
        (
            lambda: ExchangeConfig(rebalance=9, replicas=10).check(MOE, 2),
            "replicas=10 would put an expert twice on one device: take at most 8",
        ),
        (
            # Two nodes of two devices, to which groups belong: as many replicas as experts.
            lambda: ExchangeConfig("copies", node=2, rebalance=9, replicas=12).check(MOE, 4),
            "take at most 8",
        ),
        (
            lambda: ExchangeConfig(rebalance=9, replicas=2, chunks=2).check(MOE, 2),
            "chunks=2 does not divide the 5 experts of a device",
        ),
        (
            lambda: ParallelConfig(pipe=2, expert=2, exchange=ExchangeConfig(rebalance=9)),
            "pipe=2 does not go with parallel.exchange.rebalance=9 yet",
        ),
        (lambda: MoEConfig(rule="balanced", bias_rate=0, groups=2), "knows no groups"),
    ],
)
def test_impossible_settings_are_one_line(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
