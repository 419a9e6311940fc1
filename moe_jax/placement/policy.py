"""Which experts should stay in fast memory: one score for each, updated at every use.

Experts of all layers are numbered together, layer · E + expert, N in all. A policy gives every one
a score, and placement.place decides by the scores who leaves and who enters. No policy ever changes
a result: an expert that is not resident is fetched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from moe_jax.config import require


class Policy(ABC):
    """Scores `size` experts. Those of equal scores are evicted in the order of their numbers.

    `hysteresis`: a newcomer replaces the resident of the lowest score only if its own score exceeds
    that one by this fraction. 0 asks for any advantage. An expert without it is used once and not
    kept.
    """

    name: str
    fixed = False
    """Whether its scores never change, so that no resident ever leaves."""

    def __init__(self, size: int, hysteresis: float = 0.0) -> None:
        require(size > 0, f"placement over {size} experts: there must be at least one")
        require(hysteresis >= 0, f"hysteresis is {hysteresis}: it must not be negative")
        self.size = size
        self.hysteresis = hysteresis
        self.now = 0

    def use(self, experts: Int[np.ndarray, "n"]) -> None:
        """The distinct `experts` are used together, one step after the last use."""
        self.now += 1
        self._use(experts)

    @abstractmethod
    def _use(self, experts: Int[np.ndarray, "n"]) -> None:
        """Updates the statistics behind `score`. `now` is the step's number."""

    @abstractmethod
    def score(self, experts: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Never negative. The experts of the highest scores stay."""


class LRU(Policy):
    """Least recently used leaves: score = number of the step of the last use."""

    name = "lru"

    def __init__(self, size: int, hysteresis: float = 0.0) -> None:
        super().__init__(size, 0.0)  # a time has no meaningful fraction
        self.last = np.zeros(size, np.int64)

    def _use(self, experts: np.ndarray) -> None:
        self.last[experts] = self.now

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.last[experts].astype(float)


class LFU(Policy):
    """Least frequently used leaves: score = uses so far, whether resident or not."""

    name = "lfu"

    def __init__(self, size: int, hysteresis: float = 0.0) -> None:
        super().__init__(size, hysteresis)
        self.count = np.zeros(size)

    def _use(self, experts: np.ndarray) -> None:
        self.count[experts] += 1

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.count[experts]


class DecayedLFU(Policy):
    """score = sum over uses of 2^(-age / half_life), age in steps (LRFU, Lee et al. 2001).

    The sum is kept scaled by 2^(now / half_life), so that a step touches the used experts only.
    """

    name = "decayed_lfu"

    def __init__(self, size: int, hysteresis: float = 0.0, half_life: float = 64.0) -> None:
        super().__init__(size, hysteresis)
        require(half_life > 0, f"half_life is {half_life}: it must be positive")
        self.half_life = half_life
        self.origin = 0
        self.scaled = np.zeros(size)

    def _use(self, experts: np.ndarray) -> None:
        # A float64 overflows beyond 2^1023: the origin moves long before.
        if self.now - self.origin > 500 * self.half_life:
            self.scaled *= 2.0 ** (-(self.now - self.origin) / self.half_life)
            self.origin = self.now
        self.scaled[experts] += 2.0 ** ((self.now - self.origin) / self.half_life)

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.scaled[experts] * 2.0 ** (-(self.now - self.origin) / self.half_life)


class LFRU(Policy):
    """Frequent and recent: score = uses / (1 + steps since the last use)."""

    name = "lfru"

    def __init__(self, size: int, hysteresis: float = 0.25) -> None:
        super().__init__(size, hysteresis)
        self.count = np.zeros(size)
        self.last = np.zeros(size, np.int64)

    def _use(self, experts: np.ndarray) -> None:
        self.count[experts] += 1
        self.last[experts] = self.now

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.count[experts] / (1 + self.now - self.last[experts])


class Successor(Policy):
    """Recent use, and what usually comes next: score = rate + chance.

    rate: uses a token lately (DecayedLFU's sum over the half life's mean). chance: how often the
    expert was used right after those that its layer used last, the mean over these of
    counts[before, after] / sum over after. Counts begin at 1/E, so that at first all are alike.
    """

    name = "successor"

    def __init__(
        self, size: int, layers: int, hysteresis: float = 0.0, half_life: float = 64.0
    ) -> None:
        super().__init__(size, hysteresis)
        require(layers > 0 and size % layers == 0, f"{size} experts do not divide over {layers}")
        self.recent = DecayedLFU(size, 0.0, half_life)
        self.experts = size // layers
        self.rate = layers * np.log(2) / half_life  # a use every token sums up to its inverse
        shape = (layers, self.experts, self.experts)
        self.counts = np.full(shape, 1 / self.experts)
        self.sums = np.ones(shape[:2])
        self.last: list[np.ndarray] = [np.zeros(0, int)] * layers
        self.chance = np.zeros(size)

    def _use(self, experts: np.ndarray) -> None:
        self.recent.use(experts)
        if not len(experts):
            return
        layer = int(experts[0]) // self.experts
        start = layer * self.experts
        own = experts - start
        before = self.last[layer]
        counts = self.counts[layer]
        counts[before[:, None], own] += 1
        self.sums[layer][before] += len(own)
        self.last[layer] = own
        # len(own), the number that comes next, times the mean over `own`.
        self.chance[start : start + self.experts] = (1 / self.sums[layer][own]) @ counts[own]

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.rate * self.recent.score(experts) + self.chance[experts]


class Static(Policy):
    """The placement never changes: score = how often each expert was used in a calibration run."""

    name = "static"
    fixed = True

    def __init__(self, frequency: Float[np.ndarray, "N"]) -> None:
        super().__init__(len(frequency), 0.0)
        require(bool(np.all(frequency >= 0)), "static placement: a frequency is negative")
        self.frequency = np.asarray(frequency, float)

    def _use(self, experts: np.ndarray) -> None:
        pass

    def score(self, experts: np.ndarray) -> np.ndarray:
        return self.frequency[experts]


ONLINE: dict[str, Callable[[int, int], Policy]] = {
    **{kind.name: lambda size, _, kind=kind: kind(size) for kind in (LRU, LFU, DecayedLFU, LFRU)},
    Successor.name: Successor,
}
"""Policies that learn as they go, by name. Each takes the number of experts and of layers."""


def make_policy(
    name: str, size: int, layers: int = 1, frequency: Float[np.ndarray, "N"] | None = None
) -> Policy:
    """The policy called `name` for `size` experts in `layers`. `static` needs frequencies.
    UserError: there is none."""
    if name == Static.name:
        require(frequency is not None, "placement policy static needs a trace to count uses in")
        assert frequency is not None
        return Static(frequency)
    known = ", ".join([Static.name, *ONLINE])
    require(name in ONLINE, f"unknown placement policy '{name}': use one of {known}")
    return ONLINE[name](size, layers)
