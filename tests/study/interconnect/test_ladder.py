"""A block on a link: what each idea gives, and the rate that software needs."""

import pytest

from moe_jax.predict.layouts.exchange import Exchange
from moe_jax.study.interconnect.ladder import PLAIN, WAYS, BlockOn, Way, equal_rate, link_rates
from tests.predict.layouts.toy import BASE, BLOCK, cluster

PAIRS = Way("pairs", Exchange(chunks=1), pairs=True)


def block(rate: float, beside: float = 0.0) -> BlockOn:
    """Four devices: an exchange of 3 MB, four of them in F + Bi + W, and 19.5 ms of products."""
    return BlockOn(BLOCK, cluster(4, inside=rate), 1000, beside)


def test_plain_adds_and_pairs_hide():
    here = block(1e9)
    exchange = 4 * (BASE + 3e-3)
    assert here.exchange(PLAIN) == pytest.approx(exchange)
    assert here.seconds(PLAIN) == pytest.approx(19.5e-3 + exchange)
    assert here.seconds(PAIRS) == pytest.approx(19.5e-3)
    assert (here.hidden(PLAIN), here.hidden(PAIRS)) == pytest.approx((0, 1))
    slow = block(1e8)
    assert slow.seconds(PAIRS) == slow.exchange(PAIRS)  # nothing hides bytes that take longer


def test_products_beside_a_transfer_are_slower():
    here = block(1e9, beside=0.5)
    assert here.seconds(PAIRS) == pytest.approx(19.5e-3 + 0.5 * here.exchange(PAIRS))
    assert here.seconds(PLAIN) == block(1e9).seconds(PLAIN)
    assert here.hidden(PAIRS) == 1


def test_the_best_is_no_slower_than_any_way():
    here = block(2e8)
    assert here.seconds(here.best()) <= min(here.seconds(way) for way in WAYS)


def test_equal_rate():
    """The rate that it finds gives the time that was asked for, and a lower one does not."""
    here = block(1e9)
    wanted = here.seconds(PLAIN)
    rate = equal_rate(here, wanted, inside=True)
    assert rate is not None
    assert rate < 1e9
    at = here.at(rate, inside=True)
    below = here.at(0.9 * rate, inside=True)
    assert at.seconds(at.best()) == pytest.approx(wanted, rel=1e-3)
    assert below.seconds(below.best()) > wanted
    assert equal_rate(here, 1e-3, inside=True) is None  # less than the products


def test_links_get_faster():
    rates = [rate for _, rate in link_rates()]
    assert rates == sorted(rates)
