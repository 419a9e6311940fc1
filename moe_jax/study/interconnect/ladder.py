"""One block with experts on several devices, with one software idea after another, over links."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_jax.predict.hardware import find_link
from moe_jax.predict.layouts.block import Block
from moe_jax.predict.layouts.block_work import BlockWork, Cluster, Part
from moe_jax.predict.layouts.exchange import Exchange
from moe_jax.predict.step_time import TERMS

LINKS = ("pcie4", "pcie5", "nvlink4_h800", "nvlink3", "nvlink4", "nvlink5")
"""By their rates, the slowest first (moe_jax/predict/hardware/links.toml)."""


@dataclass(frozen=True)
class Way:
    """How a block's exchange is done."""

    name: str
    route: Exchange
    pairs: bool = False
    """The forward of one micro-batch and the backward of another at once: all exchanges lie under
    all products (DualPipe)."""


PLAIN = Way("plain", Exchange(chunks=1))
WAYS = (
    PLAIN,
    Way("chunks", Exchange()),
    Way("copies", Exchange(copies=True)),
    Way("four nodes", Exchange(copies=True, nodes=4)),
    Way("FP8", Exchange(copies=True, nodes=4, fp8=True)),
    Way("two micro-batches", Exchange(copies=True, nodes=4, fp8=True), pairs=True),
)
"""Each has what the one before has, and one idea more."""
SOFTWARE = tuple(
    Way("software", Exchange(copies=copies, nodes=nodes, fp8=fp8), pairs)
    for copies, nodes in ((False, 0), (True, 0), (True, 4))
    for fp8 in (False, True)
    for pairs in (False, True)
)
"""All ideas and their combinations. Copies through a node need its link to be fast."""
BESIDE = TERMS["beside"]
"""By how much products slow down while a transfer runs."""


@dataclass(frozen=True)
class BlockOn:
    """A block whose experts are split over all devices of some nodes."""

    block: Block
    cluster: Cluster
    tokens: int = 4096
    beside: float = BESIDE.value

    def work(self, way: Way) -> BlockWork:
        """The block for a micro-batch."""
        devices = self.cluster.devices
        return BlockWork(self.block, self.cluster, self.tokens, devices, "none", way.route)

    def parts(self, way: Way) -> tuple[Part, Part, Part]:
        """F, Bi and W."""
        work = self.work(way)
        return work.forward, work.backward_input, work.backward_weight

    def seconds(self, way: Way) -> float:
        """Of F, Bi and W. Products that a transfer runs beside take `beside` longer."""
        if way.pairs:
            compute = self.compute(way)
            exchange = self.exchange(way)
            return max(compute + self.beside * min(compute, exchange), exchange)
        return sum(self._alone(part, way) for part in self.parts(way))

    def forward(self, way: Way) -> float:
        """Seconds of F alone, without pairs."""
        return self._alone(self.parts(way)[0], way)

    def _alone(self, part: Part, way: Way) -> float:
        seconds = part.seconds(self.work(way).parts)
        hidden = part.compute + part.exchange - seconds
        return seconds + self.beside * hidden

    def compute(self, way: Way) -> float:
        """Seconds of all that is no exchange."""
        return sum(part.compute for part in self.parts(way))

    def exchange(self, way: Way) -> float:
        """Seconds of the exchanges, hidden or not."""
        return sum(part.exchange for part in self.parts(way))

    def hidden(self, way: Way) -> float:
        """The share of the exchanges' time that lies under products."""
        total = self.exchange(way)
        if total == 0:
            return 1.0
        exposed = replace(self, beside=0.0).seconds(way) - self.compute(way)
        return 1 - exposed / total

    def best(self) -> Way:
        """The fastest of SOFTWARE."""
        return min(SOFTWARE, key=self.seconds)

    def at(self, rate: float, *, inside: bool) -> "BlockOn":
        """On a link inside of nodes, or between them, of `rate` bytes a second."""
        swept = self.cluster.with_link(rate) if inside else self.cluster.with_network(rate)
        return replace(self, cluster=swept)


def equal_rate(
    block: BlockOn, seconds: float, *, inside: bool, low: float = 1e8, high: float = 1e13
) -> float | None:
    """The least rate of a link on which the best software takes so many seconds, by bisection.

    None: it takes longer on any link up to `high`. Time never grows with the rate.
    """

    def slower(rate: float) -> bool:
        here = block.at(rate, inside=inside)
        return here.seconds(here.best()) > seconds

    if slower(high):
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slower(middle) else (low, middle)
    return high


def link_rates() -> Iterator[tuple[str, float]]:
    """(name, bytes a second) of LINKS."""
    for name in LINKS:
        yield name, find_link(name).rate
