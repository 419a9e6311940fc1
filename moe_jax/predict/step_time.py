"""The time of a step on a card: few terms, each with a range and a source, and an interval.

    product      tiles (moe_kernels.predict.product) at `gemm` of the measured rate
    kernel       a Triton kernel of ours: FLOPs at `kernel` of the rate of a large product
    attention    FLOPs at `attention` of that rate, backward at `attention gradient`
    rest         bytes at `memory` of the memory's peak
    any kernel   at least its bytes at `memory`, and `launch` seconds
    transfer     predict.collectives, at `link` of the measured rate
    beside one   a kernel takes `beside` longer while a transfer runs
    the step     all of it times `model`, for what these terms do not say

The interval is the root of the sum of squares of what each term's ends change by themselves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from moe_kernels.predict import Device
from moe_kernels.predict.product import Product, launch_seconds

from moe_jax.predict.collectives import Fabric
from moe_jax.predict.hardware import Card, Link
from moe_jax.predict.schedule import Schedule
from moe_jax.predict.scheduled_hlo import Rates, Timeline, run
from moe_jax.predict.work import Work


class Term(NamedTuple):
    """A number of the model."""

    value: float
    fast: float
    """The end of its range with the shorter time."""
    slow: float
    source: str


TERMS: dict[str, Term] = {
    "gemm": Term(0.9, 1.0, 0.75, "assumed: the measured rate is that of the best of many shapes"),
    "kernel": Term(
        0.52,
        0.73,
        0.36,
        "kernel_ladder: its bound is 0.76 of a large product, and published kernels reach 0.49 to "
        "0.94 of such bounds",
    ),
    "attention": Term(0.6, 0.75, 0.45, "FlashAttention-3 (arXiv:2407.08608), causal, on an H100"),
    "attention gradient": Term(0.5, 0.65, 0.35, "the same, backward"),
    "memory": Term(0.9, 0.95, 0.75, "assumed"),
    "link": Term(1.0, 1.1, 0.8, "of the rate in links.toml"),
    "launch": Term(3e-6, 1.5e-6, 6e-6, "seconds, moe_kernels.predict.LAUNCH"),
    "beside": Term(0.15, 0.05, 0.3, "DeepEP keeps 20 of 132 multiprocessors"),
    "model": Term(
        1.0, 0.77, 1.11, "of the whole step: the rows that calibrate are -10% and +29% off"
    ),
}
TILES = ((128, 256), (128, 128), (64, 128), (64, 64))
"""Rows and columns of the tiles that a plain product may have. The fastest one counts."""
DEPTH = 64
"""Depth of a step of a tile."""


@dataclass(frozen=True)
class CardRates(Rates):
    """The prices of a card under a choice of TERMS."""

    card: Card | None = None
    terms: Mapping[str, float] | None = None

    @classmethod
    def of(cls, card: Card, terms: Mapping[str, float]) -> "CardRates":
        """The prices with these values of TERMS."""
        fabric = Fabric.of(card)
        share = terms["link"]
        return cls(
            fabric=replace(
                fabric,
                inside=_scaled(fabric.inside, share),
                outside=_scaled(fabric.outside, share),
            ),
            slowed=terms["beside"],
            card=card,
            terms=terms,
        )

    def seconds(self, work: Work) -> float:
        """Of a kernel alone."""
        assert self.card is not None
        assert self.terms is not None
        moved = work.bytes / (self.terms["memory"] * self.card.xla["memory_bandwidth"])
        return max(moved, self._product_seconds(work)) + self.terms["launch"]

    def _product_seconds(self, work: Work) -> float:
        assert self.card is not None
        assert self.terms is not None
        if work.kind == "rest":
            return 0.0
        if work.kind == "product":
            rate = self.terms["gemm"] * self.card.product_rate
            tiled = 0.0
            if math.prod(work.shape):
                tiled = tiled_seconds(work.shape, self.card) / self.terms["gemm"]
            return max(tiled, work.flops / rate)
        return work.flops / (self.terms[work.kind] * self.card.product_rate)


def _scaled(link: Link, share: float) -> Link:
    return replace(link, rate=link.rate * share)


@lru_cache(4096)
def _tiled(shape: tuple[int, int, int, int], device: Device) -> float:
    batch, rows, columns, depth = shape
    times = []
    for bm, bn in TILES:
        tiles = batch * math.ceil(rows / bm) * math.ceil(columns / bn)
        product = Product(
            depth=depth,
            columns=columns,
            halves=1,
            bm=bm,
            bn=bn,
            bk=DEPTH,
            stages=4,
            group=8,
            resident=1 if bm * bn > 128 * 128 else 2,
            special=0,
            threads=256,
            stored=1,
            gathered=False,
        )
        times.append(launch_seconds(tiles, 0.0, product, device))
    return min(times)


def tiled_seconds(shape: tuple[int, int, int, int], card: Card) -> float:
    """Of a product (batch, rows, columns, depth) whose tiles fill the card in waves."""
    return _tiled(shape, device_of(card))


def device_of(card: Card) -> Device:
    """The card as the kernels' time model knows it.

    The L2 cache is no limit here: cuBLAS loads once for several multiprocessors. With the rate that
    holds for single ones a B200 would have half of its measured rate.
    """
    return Device(
        name=card.name,
        arch=card.arch,
        multiprocessors=int(card.xla["core_count"]),
        gemm=card.product_rate,
        memory=card.memory_rate,
        l2_bytes=card.xla["l2_cache_size"],
        l2_rate=math.inf,
        l2_rate_low=math.inf,
        latency=6e-7,
        special=math.inf,
    )


class Prediction(NamedTuple):
    """Seconds of a step, with the interval and what it is made of."""

    seconds: float
    low: float
    high: float
    line: Timeline
    effects: dict[str, tuple[float, float]]
    """By term: seconds that its fast and its slow end change."""


def predict(schedule: Schedule, card: Card) -> Prediction:
    """The time of a program on a card, PREDICTED."""
    values = {name: term.value for name, term in TERMS.items()}
    line = run(schedule, CardRates.of(card, values))

    def change(name: str, end: float) -> float:
        other = values | {name: end}
        return run(schedule, CardRates.of(card, other)).total * other["model"] - line.total

    effects = {
        name: (change(name, term.fast), change(name, term.slow)) for name, term in TERMS.items()
    }
    less = math.sqrt(sum(fast**2 for fast, _ in effects.values()))
    more = math.sqrt(sum(slow**2 for _, slow in effects.values()))
    return Prediction(line.total, line.total - less, line.total + more, line, effects)
