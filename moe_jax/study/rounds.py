"""Speeds from rounds: everything is timed once in each round, and ratios are taken within one.

Other work on the machine slows down a whole round, so it cancels in a ratio of the same round.
"""

import numpy as np
from numpy.typing import ArrayLike


def speedup(seconds: ArrayLike, baseline: ArrayLike) -> float:
    """How many times as fast as the baseline: the median over rounds of baseline / seconds.

    Both are float[rounds]. A round in which either is NaN (it was left out) does not count.
    """
    own = np.asarray(seconds, float)
    other = np.asarray(baseline, float)
    assert own.shape == other.shape, f"{own.shape} and {other.shape}: not the same rounds"
    return float(np.nanmedian(other / own))
