"""95% intervals over seeds.

Runs of one seed share the order of their data and most of their start, so two arms are compared by
their differences seed by seed. The interval of a mean is Student's t with n - 1 degrees of freedom:

    mean ± t(0.975, n - 1) · s / √n
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds and the bounds of its 95% interval. One seed has infinite bounds."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the interval lies on one side of `value`."""
        return self.low > value or self.high < value

    @property
    def bounds(self) -> list[float] | None:
        """[low, high] as result.json has it, or None for one seed."""
        return [self.low, self.high] if math.isfinite(self.low) else None


def mean_interval(values: ArrayLike) -> Interval:
    """The mean of float[seeds] and its interval."""
    array = np.asarray(values, float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, -math.inf, math.inf)
    error = float(stats.sem(array))
    if error == 0:  # scipy gives nan here, but equal values leave no doubt about their mean
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(array) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high))


def paired_interval(one: ArrayLike, other: ArrayLike) -> Interval:
    """The mean of one - other, both float[seeds] in the order of the same seeds, and its interval.

    Where one has fewer seeds, only the seeds of both are compared: the first ones.
    """
    first = np.asarray(one, float)
    second = np.asarray(other, float)
    count = min(len(first), len(second))
    return mean_interval(first[:count] - second[:count])
