"""Counters: what a store of experts has moved, and when."""

from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import NamedTuple

RECORDED = 10_000
"""Copies and fetches whose times are kept, from the first on: a long run has no end of them."""


class Copy(NamedTuple):
    """One expert brought to the device, in seconds since the store was created."""

    expert: int
    begin: float
    end: float
    ahead: bool
    """Fetched on a prediction."""


@dataclass
class Traffic:
    """What a store has done since it was created or `reset`."""

    uses: int = 0
    hits: int = 0
    """Uses whose expert was resident."""
    ahead: int = 0
    """Uses that were no hits, but whose expert a prediction had asked for."""
    computed: int = 0
    """Uses that were no hits, but were computed in host memory without a copy."""
    low_bit: int = 0
    """Uses for which an 8-bit copy stood in."""
    disk_bytes: int = 0
    host_bytes: int = 0
    """Bytes brought to the device from host memory."""
    wasted_bytes: int = 0
    """Of all these, the bytes of predictions that did not come true."""
    waited: float = 0.0
    """Seconds in which `fetch` read, or waited for reads and copies."""
    peak_bytes: int = 0
    """Most bytes of experts on the device at once."""
    copies: list[Copy] = field(default_factory=list)
    """The first RECORDED ones."""
    fetches: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of the first RECORDED calls of `fetch`. Between two the caller computes."""

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 1.0


class TrafficMeter:
    """The store's counters and their clock. `copied` may be called in any thread, all else in the
    store's own."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.reset()

    def reset(self) -> None:
        """Counts from zero, and the clock begins anew."""
        self.traffic = Traffic()
        self._born = perf_counter()

    def now(self) -> float:
        """Seconds since the last reset."""
        return perf_counter() - self._born

    def copied(self, expert: int, begin: float, ahead: bool, *, disk: int, host: int) -> None:
        """Counts one expert brought to a memory since `begin`, with its bytes by where it was."""
        copy = Copy(expert, begin, self.now(), ahead)
        with self._lock:
            self.traffic.disk_bytes += disk
            self.traffic.host_bytes += host
            if len(self.traffic.copies) < RECORDED:
                self.traffic.copies.append(copy)

    def fetched(self, begin: float) -> None:
        """Notes a `fetch` that began at `begin` and ends now."""
        if len(self.traffic.fetches) < RECORDED:
            self.traffic.fetches.append((begin, self.now()))
