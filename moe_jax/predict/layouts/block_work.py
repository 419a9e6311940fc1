"""Seconds of a block's F, Bi and W on one device, from three bounds.

    products   max(FLOPs / product rate, bytes of weights / memory rate)
    exchange   what takes rows to their experts, and back (exchange.py)
    exposed    max(exchange / n, exchange - (1 - 1/n) expert products), in n chunks

F and Bi read a block's weights in bfloat16. W reads and writes their gradient's sum in float32, in
every micro-batch. Everything that is no product is left out, in all layouts alike: norms, rotary
embedding, routing, softmax, launches.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moe_jax.predict.collectives import Fabric, Group, collective_seconds
from moe_jax.predict.hardware import Card
from moe_jax.predict.layouts.block import Block, Level, Recompute
from moe_jax.predict.layouts.exchange import (
    FP8,
    NUMBER,
    ROUNDING,
    Exchange,
    Rows,
    exchange_seconds,
    rows_of_token,
)

PRODUCT_SHARE = 0.75
"""Rate of a layer's products relative to the largest product: on an H100, 600 of 794.5 TFLOP/s.
In Megatron-LM a Mixtral layer reaches 667 with its dispatch, and DeepSeek's 535 (the baseline of
its functional test moe_perf)."""
SUM = 4
"""Bytes of a gradient's sum, in float32."""
STATE = 12
"""Bytes of a parameter and its two moments, in float32."""
USABLE = 0.9
"""Share of the card's memory for arrays. The rest is the collectives' workspace, the allocator's
gaps, logits and the embedding. It is an assumption."""


@dataclass(frozen=True)
class Cluster:
    """N equal devices."""

    card: Card
    devices: int
    """N"""

    @property
    def fabric(self) -> Fabric:
        """The links."""
        return Fabric.of(self.card)

    @property
    def product_rate(self) -> float:
        """FLOP/s of a layer's products."""
        return PRODUCT_SHARE * self.card.product_rate

    def group(self, size: int, stride: int = 1) -> Group:
        """`size` devices of which each is the `stride`-th after the one before."""
        return Group(size, max(1, min(size, self.card.node // stride)))

    def seconds(self, kind: str, bytes: float, size: int, stride: int = 1) -> float:
        """Of a collective over such a group, with so many bytes on each device before it."""
        return collective_seconds(kind, bytes, self.group(size, stride), self.fabric)

    def with_network(self, rate: float) -> "Cluster":
        """The same with `rate` bytes a second of a device between nodes."""
        network = replace(self.card.network, name="swept", peak=rate, rate=rate)
        return replace(self, card=replace(self.card, network=network))

    def with_link(self, rate: float) -> "Cluster":
        """The same with `rate` bytes a second of a device inside of a node."""
        link = replace(self.card.link, name="swept", peak=rate, rate=rate)
        return replace(self, card=replace(self.card, link=link))


class Part(NamedTuple):
    """Seconds of F, Bi or W of one block and one micro-batch."""

    compute: float
    exchange: float = 0.0
    """Of all its all-to-alls."""
    experts: float = 0.0
    """Of `compute`: products of the routed experts, under which the exchange can lie."""

    def seconds(self, chunks: int) -> float:
        """With what the exchange leaves exposed."""
        hidden = self.experts * (1 - 1 / chunks)
        return self.compute + max(self.exchange / chunks, self.exchange - hidden)


@dataclass(frozen=True)
class BlockWork:
    """A block for one micro-batch of a device."""

    block: Block
    cluster: Cluster
    tokens: int
    """Of a micro-batch on one device."""
    expert_axis: int = 1
    """Devices that share the experts of a block. They are neighbours."""
    recompute: Recompute = "none"
    route: Exchange = field(default_factory=Exchange)

    @property
    def parts(self) -> int:
        """Chunks, as far as a device has experts."""
        return max(1, min(self.route.chunks, self.block.experts // self.expert_axis))

    @property
    def local_experts(self) -> float:
        """Expert parameters of a block on a device."""
        return self.block.expert_weights / self.expert_axis

    @property
    def local(self) -> float:
        """Parameters of a block on a device, while it is used."""
        return self.local_experts + self.block.other_weights

    @property
    def rows(self) -> Rows:
        """Rows of a token that travel to other devices."""
        group = self.cluster.group(self.expert_axis)
        return rows_of_token(self.route, self.block.experts, self.block.per_token, group)

    @property
    def exchange(self) -> float:
        """Seconds of one all-to-all in bfloat16."""
        return self._exchange(NUMBER)

    @property
    def dispatch(self) -> float:
        """Seconds in which activations reach the experts."""
        return self._exchange(FP8 if self.route.fp8 else NUMBER)

    def _exchange(self, bytes: float) -> float:
        bytes *= self.tokens * self.block.width
        group = self.cluster.group(self.expert_axis)
        return exchange_seconds(self.rows, bytes, group, self.cluster.fabric)

    @property
    def forward(self) -> Part:
        """F: products, dispatch and combine."""
        part = self._part(self.block.forward, NUMBER)
        return part._replace(
            compute=part.compute + self._rounding, exchange=self.dispatch + self.exchange
        )

    @property
    def _rounding(self) -> float:
        """Seconds of the passes over FP8 rows."""
        if not self.route.fp8:
            return 0.0
        numbers = self.tokens * self.block.width * (self.rows.received + 1)
        return ROUNDING * numbers / self.cluster.card.memory_rate

    @property
    def backward_input(self) -> Part:
        """Bi, after what is recomputed. A full recomputation dispatches again.

        It does not combine again, because nothing reads the result.
        """
        own = self._part(self.block.backward_input, NUMBER)._replace(exchange=2 * self.exchange)
        if self.recompute == "full":
            again = self.forward._replace(exchange=self.dispatch)
        else:
            flops = self.tokens * self.level.again
            again = Part(flops / self.cluster.product_rate)
        return Part(*(one + other for one, other in zip(own, again, strict=True)))

    @property
    def backward_weight(self) -> Part:
        """W."""
        return self._part(self.block.backward_weight, 2 * SUM)

    @property
    def message(self) -> float:
        """Bytes that a stage sends to the next one."""
        return NUMBER * self.tokens * self.block.width

    @property
    def level(self) -> Level:
        """What is kept and recomputed, for a token."""
        return self.block.levels[self.recompute]

    @property
    def kept(self) -> float:
        """Bytes of a block from F to W."""
        return self.tokens * self.level.kept

    @property
    def pending(self) -> float:
        """Bytes of a block from Bi to W."""
        return self.tokens * self.level.pending

    def _part(self, flops: float, bytes_of_weight: int) -> Part:
        routed = 2 * self.tokens * self.block.active - 2 * self.tokens * self.block.other_weights
        experts = self._bound(routed, bytes_of_weight * self.local_experts)
        others = self._bound(
            self.tokens * flops - routed, bytes_of_weight * self.block.other_weights
        )
        return Part(experts + others, 0.0, experts)

    def _bound(self, flops: float, bytes: float) -> float:
        return max(flops / self.cluster.product_rate, bytes / self.cluster.card.memory_rate)
