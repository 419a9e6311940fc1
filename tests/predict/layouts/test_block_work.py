"""Seconds of a block's F, Bi and W, by hand."""

import pytest

from moe_jax.predict.layouts.block_work import Part
from tests.predict.layouts.toy import BASE, work


def test_products_are_bound_by_flops_or_by_weights():
    """1000 tokens: 6.5, 7 and 6 GFLOP at 1 TFLOP/s."""
    many = work()
    assert many.forward.compute == pytest.approx(6.5e-3)
    assert many.backward_input.compute == pytest.approx(7e-3)
    assert many.backward_weight.compute == pytest.approx(6e-3)
    # One token: 8 MB of experts take longer than their 4 MFLOP. The others have 2.5 MFLOP, 2 MB.
    one = work(tokens=1)
    assert one.forward.compute == pytest.approx(8e-6 + 2.5e-6)
    # Sums of gradients are read and written in float32.
    assert one.backward_weight.compute == pytest.approx(8 * 5e6 / 1e12)


def test_an_expert_axis_reads_fewer_experts():
    """2 MB of experts, which take less time than 4 MFLOP."""
    assert work(tokens=1, axis=4).forward.compute == pytest.approx(4e-6 + 2.5e-6)


def test_exchange():
    """1000 tokens to 2 experts each: 4 MB of bfloat16, three quarters of them to 3 others."""
    one = BASE + 3e6 / 1e9
    shared = work(axis=4)
    assert shared.forward.exchange == pytest.approx(2 * one)
    assert shared.backward_input.exchange == pytest.approx(2 * one)
    assert shared.backward_weight.exchange == 0
    assert work(axis=1).forward.exchange == 0


def test_what_lies_under_the_experts():
    """6 ms of transfers, 4 ms of experts."""
    part = Part(compute=10.0, exchange=6.0, experts=4.0)
    assert part.seconds(1) == 16.0
    assert part.seconds(2) == 10.0 + (6.0 - 2.0)
    assert part.seconds(4) == 10.0 + (6.0 - 3.0)
    short = Part(compute=10.0, exchange=2.0, experts=4.0)
    assert short.seconds(4) == 10.0 + 0.5  # the first and the last chunk are exposed


def test_no_more_chunks_than_experts():
    assert work(axis=1, chunks=8).parts == 4
    assert work(axis=4, chunks=8).parts == 1


def test_recomputation():
    """Selectively 1 MFLOP a token more. In full 6.5, and the dispatch."""
    assert work(recompute="selective").backward_input.compute == pytest.approx(8e-3)
    full = work(axis=4, recompute="full").backward_input
    assert full.compute == pytest.approx(13.5e-3)
    assert full.exchange == pytest.approx(3 * work(axis=4).exchange)
    assert work(recompute="full").forward == work().forward


def test_bytes():
    one = work(recompute="selective")
    assert one.message == 2 * 1000 * 1000
    assert one.kept == 1000 * 10_000
    assert one.pending == 1000 * 20_000
