"""The schedule kernels in Triton's interpreter: every array bit for bit as the plan made in jnp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from moe_kernels.schedule import reference, schedule
from moe_kernels.schedule.shapes import Sizes

from moe_jax.moe.plan import make_plan
from moe_jax.parallel.mesh import make_mesh

pytest.importorskip("triton")

specified = jax.jit(reference.schedule, static_argnums=(1, 2, 3, 4))
plan_of = jax.jit(make_plan, static_argnums=(1, 2))
ARRAYS = ("load", "counts", "starts", "assignment", "row", "block_expert")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def assert_same(actual, expected):
    for name in ARRAYS:
        one = getattr(actual, name)
        other = getattr(expected, name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        np.testing.assert_array_equal(one, other, err_msg=name)


def check(experts, num_experts, capacity=None):
    """The plan by kernels is the plan in jnp, and both are the reference."""
    experts = jnp.asarray(experts, jnp.int32)
    expected = plan_of(experts, num_experts, capacity)
    actual = make_plan(experts, num_experts, capacity, kernels=True)
    assert (actual.block_rows, actual.most) == (expected.block_rows, expected.most)
    assert_same(actual, expected)
    blocks = expected.block_expert.size
    plain = specified(experts, num_experts, expected.block_rows, blocks, capacity)
    for name, array in zip(ARRAYS, plain, strict=True):
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name)


def some(tokens, per_token, experts, unassigned=0.0, seed=0):
    """Distinct experts of each token. A fraction of the assignments has no expert."""
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(experts)[:per_token] for _ in range(tokens)])
    return np.where(random.random(chosen.shape) < unassigned, experts, chosen)


CASES = {
    "whole chunks": (some(64, 4, 8), 8),
    "no powers of two": (some(37, 3, 5), 5),
    "60 experts": (some(90, 4, 60), 60),
    "256 experts": (some(50, 8, 256), 256),
    "384 experts, fewer assignments": (some(5, 8, 384), 384),
    "an expert without a token": (np.full((9, 2), (0, 3)), 4),
    "the first and the last without": (np.full((9, 2), (1, 2)), 4),
    "all to one": (np.full((300, 1), 2), 4),
    "all to the last": (np.full((300, 1), 3), 4),
    "K = E": (some(33, 5, 5), 5),
    "E = 1": (np.zeros((200, 1)), 1),
    "T = 1": (some(1, 2, 4), 4),
    "T = K = E = 1": (np.zeros((1, 1)), 1),
    "no token": (np.zeros((0, 2)), 4),
    "no expert at all": (np.full((9, 2), 4), 4),
    "some without an expert": (some(200, 3, 7, unassigned=0.3), 7),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_plan_in_jnp(name):
    check(*CASES[name])


def test_chunks_are_scanned_in_several_steps(monkeypatch):
    monkeypatch.setattr("moe_kernels.schedule.api.SIZES", Sizes(chunk=16, scan_chunks=4))
    check(some(100, 3, 9), 9)


@pytest.mark.parametrize("capacity", [1, 11, 1000])
def test_a_capacity_leaves_the_same_assignments_out(capacity):
    check(some(70, 3, 6, unassigned=0.1), 6, capacity)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_equals_the_reference_for_any_routing(data):
    # Few shapes, many routings: each new shape is a compilation.
    tokens, per_token, num_experts, rows = data.draw(
        st.sampled_from([(1, 3, 5, 16), (47, 4, 3, 16), (80, 2, 20, 16)])
    )
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Also what no gate gives: one expert several times for a token.
    skew = data.draw(st.sampled_from([1.0, 4.0]))
    drawn = random.random((tokens, per_token)) ** skew * (num_experts + 1)
    experts = jnp.asarray(drawn, jnp.int32)
    capacity = data.draw(st.sampled_from([None, 9]))
    actual = schedule(experts, num_experts, rows, capacity=capacity)
    blocks = actual.block_expert.size
    plain = specified(experts, num_experts, rows, blocks, capacity)
    for name, array in zip(ARRAYS, plain, strict=True):
        np.testing.assert_array_equal(getattr(actual, name), array, err_msg=name)


def test_the_same_bits_every_time_under_jit_and_under_vmap():
    experts = jnp.asarray(some(30, 2, 5), jnp.int32)
    make = partial(schedule, num_experts=5, block_rows=16)
    once = make(experts)
    assert_same(make(experts), once)
    assert_same(jax.jit(make)(experts), once)
    both = jax.vmap(make)(jnp.stack([experts[::-1], experts]))
    assert_same(jax.tree.map(lambda a: a[1], both), once)


def test_each_device_plans_its_own_tokens():
    experts = jnp.asarray(some(30, 2, 5), jnp.int32)

    def rows(experts):
        return schedule(experts, 5, 16).row

    shared = jax.shard_map(
        rows, mesh=make_mesh(devices=jax.devices()[:2]), in_specs=P("data"), out_specs=P("data")
    )
    parts = [rows(half) for half in jnp.split(experts, 2)]
    np.testing.assert_array_equal(jax.jit(shared)(experts), np.concatenate(parts))


def test_blocks_of_no_power_of_two_are_refused():
    with pytest.raises(ValueError, match="blocks of 24 rows: the kernels take powers of two"):
        schedule(jnp.zeros((4, 2), jnp.int32), 4, 24)


def test_without_a_way_to_run_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"the devices are cpu.*use implementation 'auto'"):
        schedule(jnp.zeros((4, 2), jnp.int32), 4, 16)
