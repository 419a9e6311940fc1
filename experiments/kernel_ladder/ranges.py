"""Ranges in place of points, and a rung's time as one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Range(NamedTuple):
    """From the lowest to the highest value that the model, or the rounds, allow."""

    low: float
    high: float

    def text(self) -> str:
        """`0.52-1.71`."""
        return f"{few_digits(self.low)}-{few_digits(self.high)}"


def few_digits(value: float) -> str:
    """Two or three digits without an exponent."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def speed(own: Range, other: Range) -> Range:
    """Speed of one over another, from ranges of their times that know nothing of each other."""
    return Range(other.low / own.high, other.high / own.low)


def covering(values: Iterable[float]) -> Range:
    """The least range that holds all values."""
    found = list(values)
    return Range(min(found), max(found))


def covering_all(ranges: Iterable[Range]) -> Range:
    """The least range that holds all ranges."""
    found = list(ranges)
    return Range(min(r.low for r in found), max(r.high for r in found))


def total(ranges: Iterable[Range]) -> Range:
    """The range of a sum."""
    found = list(ranges)
    return Range(sum(r.low for r in found), sum(r.high for r in found))


@dataclass(frozen=True)
class Step:
    """One rung on one shape."""

    seconds: Range
    """Calibrated where it is predicted; from the fastest to the slowest round where measured."""
    bound: float | None = None
    """Seconds that the model does not go below. None where it is measured."""
    bound_low_l2: float | None = None
    """The bound with L2 at the lowest rate that is reported. None where it is no kernel of ours."""
    dram_gigabytes: float | None = None
    note: str = ""
    """What ptxas reports of the products, or what was measured beside the time."""
    left_out: str = ""
    """Why the device cannot run it. Its time is compared with nothing then."""
