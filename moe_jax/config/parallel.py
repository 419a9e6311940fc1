"""Settings that spread a run over devices."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import known_choices, not_negative, positive
from moe_jax.config.exchange import ExchangeConfig

if TYPE_CHECKING:
    from moe_jax.config.train import TrainConfig

Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe", "dualpipev"
]


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over devices. The product of all axes is the number of devices.

    No axis changes the result of an update, up to rounding. A continued run may have other axes."""

    data: int = 0
    """Copies of the model, each with its own rows of the batch. 0: the devices that remain."""
    fsdp: int = 1
    """Devices that share each parameter, and have their own rows of the batch.
    A layer's parameters are gathered when it runs."""
    expert: int = 1
    """Devices that share the routed experts, and have their own rows of the batch.
    It must divide model.moe.experts. Other parameters are split over it as over fsdp."""
    tensor: int = 1
    """Devices that share the heads, hidden units and vocabulary, and have the same rows.
    It must divide the query heads, the KV heads, the hidden widths and the vocabulary."""
    pipe: int = 1
    """Devices of a pipeline, each with its share of the layers."""
    schedule: Schedule = "1f1b"
    """Order of a pipeline's work (docs/pipeline.md)."""
    microbatches: int = 0
    """Parts of a batch that a pipeline works on at the same time. 0: twice its devices."""
    chunks: int = 2
    """Pieces of each device's share of the layers, for the schedule `interleaved`."""
    fake_devices: int = 0
    """Run on the CPU as if it were this many devices. 0: use the devices that are there.
    For trying out a layout: it makes nothing faster."""

    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """How tokens reach experts on other devices of the axis `expert`."""

    def __post_init__(self) -> None:
        owner = "parallel"
        positive(owner, self, "fsdp", "expert", "tensor", "pipe")
        positive(owner, self, "chunks")
        known_choices(owner, self)
        not_negative(owner, self, "data", "fake_devices", "microbatches")
        require(
            self.fake_devices <= 1024,  # each has threads of its own
            f"{owner}.fake_devices is {self.fake_devices}: it must be at most 1024",
        )
        require(
            self.pipe > 1 or self.microbatches == 0,
            f"{owner}.microbatches={self.microbatches} needs a pipeline: set {owner}.pipe, or use "
            "optim.accumulation",
        )
        require(
            self.pipe == 1 or self.tensor == 1,
            f"{owner}.pipe={self.pipe} does not go with {owner}.tensor={self.tensor} yet: set one "
            "of them to 1",
        )
        require(
            self.pipe == 1 or self.expert == 1 or self.exchange.kind != "ring",
            f"{owner}.exchange.kind=ring does not go with {owner}.pipe={self.pipe}: its transfers "
            "are of all stages together, which do different steps in a tick; take all_to_all",
        )
        require(
            self.pipe == 1 or self.exchange.rebalance == 0,
            f"{owner}.pipe={self.pipe} does not go with {owner}.exchange.rebalance="
            f"{self.exchange.rebalance} yet: set pipe to 1, or rebalance to 0",
        )

    @property
    def fixed(self) -> int:
        """Devices of all axes but `data`."""
        return math.prod((self.fsdp, self.expert, self.tensor, self.pipe))

    @property
    def settings(self) -> str:
        """The axes above 1, as the command line spells them."""
        names = ("data", "fsdp", "expert", "tensor", "pipe")
        sizes = {name: getattr(self, name) for name in names}
        return ", ".join(f"parallel.{name}={size}" for name, size in sizes.items() if size > 1)

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of every axis over so many devices. UserError: they do not fill them."""
        require(
            devices % self.fixed == 0,
            f"{self.settings} need a multiple of {self.fixed} devices, and there are {devices}: "
            "make an axis smaller, or try the layout with parallel.fake_devices",
        )
        data = self.data or devices // self.fixed
        require(
            data * self.fixed == devices,
            f"{self.settings} are {data * self.fixed} devices, and there are {devices}: leave "
            "parallel.data unset for all that remain",
        )
        return {
            "pipe": self.pipe,
            "data": data,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "tensor": self.tensor,
        }


def check_layout(config: "TrainConfig") -> None:
    """UserError: an axis does not divide what is split over it.

    What depends on the number of devices is checked with the mesh (parallel.mesh, train.engines).
    """
    parallel = config.parallel
    model = config.model
    if model.moe_layers:
        _divides(parallel, "expert", "model.moe.experts", model.moe.experts)
        parallel.exchange.check(model.moe, parallel.expert)
        _divides(parallel, "tensor", "model.moe.expert_hidden", model.moe.expert_hidden)
    require(
        model.moe_layers > 0 or parallel.exchange.rebalance == 0,
        f"parallel.exchange.rebalance={parallel.exchange.rebalance} needs a model with experts",
    )
    if parallel.exchange.rebalance:
        parts = parallel.expert * parallel.tensor
        require(
            model.width % parts == 0,
            f"model.width={model.width} does not divide over parallel.expert={parallel.expert} and "
            f"parallel.tensor={parallel.tensor}, which each have a part of every expert where "
            f"parallel.exchange.rebalance is set: make it a multiple of {parts}",
        )
    if model.dense_layers:
        _divides(parallel, "tensor", "model.dense_hidden", model.dense_hidden)
    attention = model.attention
    _divides(parallel, "tensor", "model.attention.heads", attention.heads)
    if attention.kind == "gqa":
        _divides(parallel, "tensor", "model.attention.kv_heads", attention.kv_heads)
    if model.vocabulary is not None:
        _divides(parallel, "tensor", "model.vocabulary", model.vocabulary)


def _divides(parallel: ParallelConfig, axis: str, name: str, value: int) -> None:
    size = getattr(parallel, axis)
    require(
        value % size == 0,
        f"parallel.{axis}={size} does not divide {name}={value}: make {name} "
        f"{math.ceil(value / size) * size}, or the axis smaller",
    )
