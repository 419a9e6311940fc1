"""Intervals over seeds: paired, Student's t, and defined for one seed and for equal values."""

import math

import numpy as np
import pytest
from scipy import stats

from moe_jax.study.intervals import mean_interval, paired_interval


def test_the_interval_of_a_mean():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    # t(0.975, 2) · 1 / √3 = 4.3027 / 1.7321
    np.testing.assert_allclose(found.bounds, [2 - 2.4841, 2 + 2.4841], atol=1e-3)
    assert mean_interval([1.0]).bounds is None
    assert not math.isfinite(mean_interval([1.0]).low)
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_differences_are_paired_over_the_seeds():
    found = paired_interval([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert found.mean == 2.0
    np.testing.assert_allclose([found.low, found.high], [2 - 2.4841, 2 + 2.4841], atol=1e-3)


def test_a_paired_interval_is_the_paired_t_tests():
    rng = np.random.default_rng(0)
    one = rng.normal(2.0, 0.3, 5)
    other = one + rng.normal(0.1, 0.02, 5)
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    found = paired_interval(one, other)
    assert found.low == pytest.approx(expected.low, rel=1e-12)
    assert found.high == pytest.approx(expected.high, rel=1e-12)


def test_only_the_seeds_of_both_are_compared():
    assert paired_interval([3.0, 5.0], [1.0, 2.0, 9.0]).mean == 2.5


def test_excludes():
    assert paired_interval([2.0, 2.1, 1.9], [1.0, 1.0, 1.0]).excludes(0)
    assert not mean_interval([-1.0, 0.0, 1.0]).excludes(0)
    assert not mean_interval([5.0]).excludes(0)
