"""Collectives by hand, and against what was measured."""

import pytest

from moe_jax.predict.collectives import Fabric, Group, collective_seconds, sent_bytes
from moe_jax.predict.hardware import Link, find_card

INSIDE = Link("inside", peak=2e9, rate=1e9, hop=1e-6, tree_hop=1e-6)
OUTSIDE = Link("outside", peak=2e8, rate=1e8, hop=1e-5, tree_hop=1e-5)
FABRIC = Fabric(4, INSIDE, OUTSIDE)
BASE = 8.4e-6


def test_groups_count_the_devices_of_a_node():
    assert Group.of([0, 1, 2, 3], 4) == Group(4, 4)
    assert Group.of([1, 5, 9], 4) == Group(3, 1)
    assert Group.of(list(range(8)), 4).nodes == 2


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3e6),
        ("reduce-scatter", 0.75e6),
        ("all-reduce", 1.5e6),
        ("all-to-all", 0.75e6),
        ("collective-permute", 1e6),
    ],
)
def test_bytes_that_are_sent(kind, sent):
    assert sent_bytes(kind, 1e6, 4) == pytest.approx(sent)


def test_rings():
    one = collective_seconds("all-gather", 1e6, Group(4, 4), FABRIC)
    assert one == pytest.approx(BASE + 3e-6 + 3e6 / 1e9)
    # Four devices of each of two nodes: four adapters, and so 0.4 GB/s.
    two = collective_seconds("reduce-scatter", 1e6, Group(8, 4), FABRIC)
    assert two == pytest.approx(BASE + 6e-6 + 1e-5 + 0.875e6 / 4e8)
    # One device of each node has one adapter.
    apart = collective_seconds("all-gather", 1e6, Group(2, 1), FABRIC)
    assert apart == pytest.approx(BASE + 1e-5 + 1e6 / 1e8)


def test_an_all_reduce_takes_the_faster_of_ring_and_tree():
    # Few bytes over many nodes: 2 log2(64) hops of a tree instead of 2 · 63 of a ring.
    small = collective_seconds("all-reduce", 8, Group(64, 1), FABRIC)
    assert small == pytest.approx(14e-6 + 12e-5, rel=1e-2)
    large = collective_seconds("all-reduce", 1e9, Group(4, 4), FABRIC)
    assert large == pytest.approx(BASE + 6e-6 + 1.5e9 / 1e9)


def test_an_all_to_all_waits_for_its_slower_way():
    # Of 8 parts one stays, 3 go to neighbours, 4 go out on the device's own adapter.
    seconds = collective_seconds("all-to-all", 8e6, Group(8, 4), FABRIC)
    assert seconds == pytest.approx(BASE + 1e-5 + 4e6 / 1e8)


def test_one_device_sends_nothing():
    assert collective_seconds("all-reduce", 1e9, Group(1, 1), FABRIC) == 0


def test_rates_that_were_measured():
    """8 H200, 16 GiB: all-gather at 361 GB/s (nccl-tests on 8 H200)."""
    fabric = Fabric.of(find_card("h200"))
    size = 16 * 2**30 / 8
    seconds = collective_seconds("all-gather", size, Group(8, 8), fabric)
    assert size * 7 / seconds == pytest.approx(361.4e9, rel=0.01)
