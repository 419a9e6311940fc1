"""Shares, specialisation and top tokens, against counts by hand."""

import numpy as np
import pytest

from moe_jax.placement.trace import Trace
from moe_jax.study.routing import by_chance, shares_by_domain, specialisation, top_tokens


def trace_of(chosen, domain, experts=4):
    return Trace(np.asarray(chosen), np.asarray(domain), experts, ("a", "b"))


def test_shares_leave_out_tokens_without_an_expert():
    trace = trace_of([[[0, 1]], [[0, 4]], [[3, 2]]], [0, 0, 1])
    shares = shares_by_domain(trace)
    np.testing.assert_allclose(shares[0, 0], [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(shares[1, 0], [0, 0, 1 / 2, 1 / 2])


@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [
        ([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], 1.0),
        ([0.25] * 4, [0.25] * 4, 0.0),
        # 1/2 · log2(4/3) + 1/2 · (1/2 · log2(2/3) + 1/2 · log2(2))
        ([1, 0, 0, 0], [0.5, 0.5, 0, 0], 0.311278),
    ],
)
def test_specialisation_is_the_mutual_information(one, other, bits):
    np.testing.assert_allclose(specialisation(np.array([[one], [other]])), [bits], atol=1e-6)


def test_permuted_domains_tell_almost_nothing():
    rng = np.random.default_rng(0)
    domain = rng.integers(0, 2, 4000)
    chosen = (2 * domain + rng.integers(0, 2, 4000))[:, None, None]
    trace = trace_of(chosen, domain)
    assert specialisation(shares_by_domain(trace))[0] > 0.99
    assert by_chance(trace, 0)[0] < 0.01


def test_top_tokens_are_those_with_the_highest_share():
    tokens = np.array([7, 7, 7, 9, 9, 5])
    chosen = np.array([[0], [0], [1], [1], [1], [1]])
    first, second, none = top_tokens(tokens, chosen, 3, count=2, least=2)
    assert first == [(7, pytest.approx(2 / 3), 3)]
    assert second == [(9, 1.0, 2), (7, pytest.approx(1 / 3), 3)]  # 5 occurs once
    assert none == []
