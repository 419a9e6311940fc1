"""Rows that travel to experts, by hand and by drawing routes."""

from itertools import combinations

import pytest

from moe_jax.predict.collectives import Fabric, Group
from moe_jax.predict.layouts.exchange import Exchange, exchange_seconds, rows_of_token
from tests.predict.layouts.toy import BASE, link, work


def test_a_row_for_each_expert():
    """4 of 16 experts, on 2 nodes of 4 devices: an eighth stays, three eighths in the node."""
    rows = rows_of_token(Exchange(), 16, 4, Group(8, 4))
    assert rows == (4 * 3 / 8, 4 * 4 / 8, 4)


def drawn(experts: int, per_token: int, group: Group) -> tuple[float, float, float]:
    """Over all sets of experts that a token of device 0 may have: rows inside, outside, received.

    A row enters a node at the device with the sender's number, 0, and goes on from there. All nodes
    do the same, so device 0 hands on what arrives from each of them.
    """
    own = experts // group.size
    inside = outside = received = count = 0
    for chosen in combinations(range(experts), per_token):
        devices = {expert // own for expert in chosen}
        nodes = {device // group.inside for device in devices}
        inside += sum(device % group.inside != 0 for device in devices)
        outside += len(nodes - {0})
        received += len(devices)
        count += 1
    return inside / count, outside / count, received / count


@pytest.mark.parametrize("group", [Group(4, 4), Group(8, 4), Group(8, 2)])
def test_one_copy_for_a_device_and_a_node(group: Group):
    rows = rows_of_token(Exchange(copies=True), 8, 3, group)
    assert rows == pytest.approx(drawn(8, 3, group))


def test_fewer_nodes_send_fewer_rows():
    """DeepSeek-V3 on 8 nodes: at most 4 of them, so at most 3.5 other nodes in the mean."""
    group = Group(64, 8)
    all_nodes = rows_of_token(Exchange(copies=True), 256, 8, group)
    four = rows_of_token(Exchange(copies=True, nodes=4), 256, 8, group)
    assert four.outside < 3.5 < all_nodes.outside < 8 * 7 / 8
    # On four nodes or fewer it changes nothing.
    few = Group(16, 8)
    assert rows_of_token(Exchange(copies=True, nodes=4), 256, 8, few) == rows_of_token(
        Exchange(copies=True), 256, 8, few
    )


def test_both_links_work_at_once():
    fabric = Fabric(4, link(1e9), link(1e8))
    group = Group(8, 4)
    rows = rows_of_token(Exchange(), 16, 4, group)
    assert exchange_seconds(rows, 1e6, group, fabric) == pytest.approx(BASE + 2e6 / 1e8)
    assert exchange_seconds(rows, 1e6, Group(1, 1), fabric) == 0


def test_fp8_dispatches_half_the_bytes_and_rounds():
    plain = work(axis=4)
    half = work(axis=4, fp8=True)
    assert half.dispatch - BASE == pytest.approx((1 + 1 / 128) / 2 * (plain.exchange - BASE))
    assert half.exchange == plain.exchange
    # The own row, and two received ones: read in a byte, written in two.
    rounding = 3 * 3 * 1000 * 1000 / 1e12
    assert half.forward.compute - plain.forward.compute == pytest.approx(rounding)
    assert half.backward_input == plain.backward_input
