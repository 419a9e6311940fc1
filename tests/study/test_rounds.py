import numpy as np
import pytest

from moe_jax.study.rounds import speedup


def test_ratios_stay_within_a_round():
    # The machine was four times as slow in the second round: the ratio does not see it.
    assert speedup([1.0, 4.0, 1.0], [2.0, 8.0, 2.0]) == 2.0


def test_rounds_that_one_was_left_out_of_do_not_count():
    assert speedup([1.0, 2.0, 1.0], [2.0, 8.0, np.nan]) == pytest.approx(3.0)


def test_different_numbers_of_rounds_are_refused():
    with pytest.raises(AssertionError, match="not the same rounds"):
        speedup([1.0], [1.0, 2.0])
