"""Expert parallelism on fake devices against the layer on one device, in float64."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from moe_kernels.experts import mixture as triton_mixture
from moe_kernels.quantise.reference import calc_diff, round_rows

from moe_jax.config.exchange import ExchangeConfig
from moe_jax.moe import reference, xla
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned, hops
from moe_jax.moe.lanes import Matrices
from moe_jax.moe.plan import make_plan

D, F, E, K = 3, 2, 8, 3
TOKENS = 14
"""Tokens of a device."""
ROUTINGS = {
    "balanced": lambda t, k: (t + k * E // K) % E,
    "one expert": lambda t, k: k,  # expert 0 and its two neighbours have every token
    "one device": lambda t, k: E - 2 + (t + k) % 2,  # all others get nothing; K - 2 repeat
    "an expert without tokens": lambda t, k: (t + k) % 7,
    "no expert": lambda t, k: np.full_like(t, E),
}
WAYS = {
    "all_gather": ExchangeConfig("all_gather"),
    "all_to_all": ExchangeConfig(),
    "chunks": ExchangeConfig(chunks=2),
    "ring": ExchangeConfig("ring"),
    "copies": ExchangeConfig("copies"),
}


def make_mesh(devices):
    return jax.make_mesh(
        (devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def make_inputs(devices, name, width=D, dtype=np.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    tokens = devices * TOKENS
    experts = ROUTINGS[name](*np.meshgrid(np.arange(tokens), np.arange(K), indexing="ij"))
    experts = np.where(rng.random(experts.shape) < 0.1, E, experts)  # some have no expert
    floats = (draw(tokens, width), draw(tokens, K), draw(E, width, 2 * F), draw(E, F, width))
    return floats, jnp.asarray(experts, jnp.int32)


def one_device(x, weights, gate_up, down, experts):
    return reference.mixture(x, weights, gate_up, down, make_plan(experts, E))


def many_devices(sharding, x, weights, gate_up, down, experts):
    """(outputs, copies that waited, on every device)"""

    def local(x, weights, gate_up, down, experts):
        owned = Experts(Matrices(gate_up, down))
        out, waited = expert_parallel(x, Assigned(experts, weights), owned, sharding)
        return out, waited.reshape(1)

    return jax.shard_map(
        local,
        mesh=make_mesh(sharding.devices),
        in_specs=(P("expert"),) * 5,
        out_specs=(P("expert"), P("expert")),
    )(x, weights, gate_up, down, experts)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def differentiated(sharding):
    """(floats, experts, direction) -> (outputs and gradients on many devices, on one, waited)."""

    def both(floats, experts, direction, floats_of_one):
        out, pull, waited = jax.vjp(
            lambda *floats: many_devices(sharding, *floats, experts), *floats, has_aux=True
        )
        expected, pull_expected = jax.vjp(
            lambda *floats: one_device(*floats, experts), *floats_of_one
        )
        return (out, *pull(direction)), (expected, *pull_expected(direction)), waited

    return jax.jit(both)


def check(exchange, devices, names, mixture=reference.mixture):
    """Outputs and every gradient, of all routings with one compilation. Returns what waited."""
    both = differentiated(Sharding("expert", devices, exchange, mixture))
    counts = {}
    for name in names:
        floats, experts = make_inputs(devices, name)
        direction = jnp.asarray(np.random.default_rng(1).normal(size=floats[0].shape))
        actual, expected, waited = both(floats, experts, direction, floats)
        for one, two in zip(actual, expected, strict=True):
            # sums of at most a hundred products in another order
            np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-10, err_msg=name)
        counts[name] = int(waited.sum())
    return counts


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("all_gather", marks=pytest.mark.slow),
        pytest.param("all_to_all", marks=pytest.mark.slow),
        "chunks",
        pytest.param("ring", marks=pytest.mark.slow),
        "copies",
    ],
)
def test_equals_one_device_with_every_gradient(way, float64):
    waited = check(WAYS[way], 2, ROUTINGS)
    assert waited["balanced"] == waited["no expert"] == 0
    # A device that gets everything gets more than a buffer holds. all_gather has no buffer.
    assert (waited["one device"] > 0) == (way != "all_gather")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_equals_one_device_with_the_fast_mixture(way, float64):
    check(WAYS[way], 2, ROUTINGS, xla.mixture)


def test_copies_are_bounded_at_the_experts():
    """64 tokens with 4 of 32 experts, on 4 devices. 256 rows are expected for each."""
    last = hops(ExchangeConfig("copies"), "expert", 4, (64, 4), own=8)[-1]
    assert last.level.size == 1
    assert last.size == 8 * 40  # 1.25 times 256
    assert last.most == 4 * 56 * 4  # 56 slots from each device, for up to 4 experts
    # One expert a device has at most a row of a copy: no room is left over.
    assert len(hops(ExchangeConfig("copies"), "expert", 4, (64, 1), own=1)) == 1


@pytest.mark.slow
def test_many_rounds_of_a_small_buffer(float64):
    waited = check(ExchangeConfig(buffer=0.3), 2, ["one expert", "one device"])
    # 3 copies of most tokens go to device 0, which has 8 slots for each source
    assert waited["one expert"] > 2 * 2 * 8


FOUR = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.moe.test_expert_parallel import *
with jax.enable_x64(True):
    print(check(ExchangeConfig(**{settings}), 4, ROUTINGS))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "copies", "node": 2},
        {"kind": "copies", "node": 2, "buffer": 0.5},
        {"kind": "copies", "node": 4},
        {"kind": "all_to_all", "chunks": 2},
        {"kind": "ring"},
    ],
    ids=str,
)
def test_four_devices(settings):
    """Two nodes of two devices among them. A process of its own, because the others have two."""
    program = [sys.executable, "-c", FOUR.format(settings=settings)]
    done = subprocess.run(program, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_fp8_rounds_the_activations_and_nothing_else():
    """Equal to the layer of the rounded activations, gradients included. The error is stated."""
    width = 192  # one tile and a half
    floats, experts = make_inputs(2, "balanced", width, np.float32)
    x, *others = floats
    both = differentiated(Sharding("expert", 2, ExchangeConfig(fp8=True), reference.mixture))
    rounded = round_rows(x, power_of_two=True)
    actual, expected, _ = both(floats, experts, x, (rounded, *others))
    for one, two in zip(actual, expected, strict=True):
        # float32 sums of 192 products in another order
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3 * float(jnp.abs(two).max()))
    exact = one_device(*floats, experts)
    # Half the squared relative error: that of a normal activation's rounding is 2.6%.
    assert 1e-5 < calc_diff(actual[0], exact) < 2e-3
    assert float(jnp.max(jnp.abs(rounded - x) / jnp.abs(x))) <= 1 / 16


@pytest.mark.slow
def test_kernels_read_matrices_where_they_lie():
    """Triton's kernels, interpreted, with two chunks: the whole arrays and an offset."""
    floats, experts = make_inputs(2, "balanced", dtype=np.float32)
    sharding = Sharding("expert", 2, ExchangeConfig(chunks=2), triton_mixture, True, True)
    actual, expected, _ = differentiated(sharding)(floats, experts, floats[0], floats)
    for one, two in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
