"""An update under FSDP, by hand. A block has 5 million parameters, F + Bi + W take 19.5 ms."""

import pytest

from moe_jax.predict.layouts.fsdp import UPDATE_TRAFFIC, fsdp
from tests.predict.layouts.toy import BASE, work

OPTIMIZER = UPDATE_TRAFFIC * 3 * 5e6 / 1e12
"""Of three blocks on one device."""


def test_one_device_has_no_transfers():
    found = fsdp(work(devices=1), blocks=3, passes=2, shards=1)
    assert found.seconds == pytest.approx(2 * 3 * 19.5e-3 + OPTIMIZER)
    # State and gradient 16 bytes, weights twice and a gradient in bfloat16, activations.
    assert found.memory == 16 * 15e6 + 6 * 5e6 + 3 * 40e6 + 20e6


def gather(rate: float) -> float:
    """Half of 10 MB of bfloat16 from the other of two devices. Two collectives: experts, others."""
    return 2 * BASE + 5e6 / rate


def test_transfers_lie_under_work_on_a_fast_link():
    """A gather of 5 ms and a reduce-scatter of 5 ms are shorter than F and than Bi + W."""
    found = fsdp(work(devices=2, inside=1e9), blocks=3, passes=2, shards=2)
    edges = 2 * gather(1e9)
    assert found.seconds == pytest.approx(6 * 19.5e-3 + edges + OPTIMIZER / 2)


def test_transfers_decide_on_a_slow_link():
    """50 ms for each of gather, gather and reduce-scatter."""
    found = fsdp(work(devices=2, inside=1e8), blocks=3, passes=2, shards=2)
    one = gather(1e8)
    assert found.seconds == pytest.approx(6 * 3 * one + 2 * one + OPTIMIZER / 2)
    exposed = fsdp(work(devices=2, inside=1e8), blocks=3, passes=2, shards=2, overlap=False)
    assert exposed.seconds == pytest.approx(6 * (3 * one + 19.5e-3) + OPTIMIZER / 2)


def test_copies_sum_their_gradients():
    """Two nodes of one device each hold the state: 30 MB of gradients go over the network."""
    found = fsdp(work(devices=2, node=1, outside=1e8), blocks=3, passes=1, shards=1)
    reduce = BASE + 30e6 / 1e8
    hidden = 3 * 13e-3
    assert found.seconds == pytest.approx(3 * 19.5e-3 + reduce - hidden + OPTIMIZER)


def test_the_experts_of_an_expert_axis_are_gathered_by_fewer():
    """4 devices, experts over 2: each gathers 1 MB of others' and a half of the experts."""
    slow = work(devices=4, axis=2, inside=1e6)
    found = fsdp(slow, blocks=1, passes=1, shards=4)
    others = BASE + 2e6 * 3 / 4 / 1e6
    experts = BASE + 4e6 / 2 / 1e6
    gathered = others + experts
    exchange = 4 * slow.exchange
    total = 3 * gathered + exchange + 2 * gathered
    assert found.seconds == pytest.approx(total + UPDATE_TRAFFIC * 5e6 / 4 / 1e12)
