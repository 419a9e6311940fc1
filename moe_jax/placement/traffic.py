"""What a store of experts has moved, and a look-ahead that watches itself."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Copy(NamedTuple):
    """One expert brought to the device, in seconds since the store was made."""

    expert: int
    begin: float
    end: float
    ahead: bool
    """Fetched on a prediction."""


@dataclass
class Traffic:
    """What a store has done since it was made or `reset`."""

    uses: int = 0
    hits: int = 0
    """Uses that found their expert resident."""
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
    """Of all these, those of predictions that did not come true."""
    waited: float = 0.0
    """Seconds in which `fetch` read, or waited for reads and copies."""
    peak_bytes: int = 0
    """Most bytes of experts on the device at once."""
    copies: list[Copy] = field(default_factory=list)
    fetches: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of every `fetch`; between two of them the caller computes."""

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 1.0


class Ahead:
    """Look-ahead that watches itself: below a floor of recall it only watches.

    recall: share of a layer's needed experts that were predicted, averaged over about 50 steps.
    """

    def __init__(self, experts: int, recall_floor: float) -> None:
        self.experts, self.recall_floor, self.recall = experts, recall_floor, 1.0
        self._predicted: tuple[int, set[int]] | None = None

    @property
    def active(self) -> bool:
        return self.experts > 0 and self.recall >= self.recall_floor

    def predict(self, layer: int, experts: list[int]) -> None:
        self._predicted = layer, set(experts)

    def compare(self, layer: int, needed: list[int]) -> None:
        """Learns what `layer` really needed, if its experts were predicted."""
        predicted, self._predicted = self._predicted, None
        if predicted is None or predicted[0] != layer or not needed:
            return
        found = len(predicted[1] & set(needed)) / len(needed)
        self.recall += 0.02 * (found - self.recall)
