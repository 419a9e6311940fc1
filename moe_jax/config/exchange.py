"""How tokens reach experts that lie on other devices."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import known_choices, not_negative, positive
from moe_jax.config.codec import MUST_MATCH
from moe_jax.config.moe import MoEConfig


@dataclass(frozen=True)
class ExchangeConfig:
    """Expert parallelism: every device owns some experts, and tokens travel
    (moe/expert_parallel.py)."""

    kind: Literal["weights", "all_gather", "all_to_all", "ring", "copies"] = "all_to_all"
    """`weights` gathers the experts' matrices to every device. No token travels.
    `all_gather` brings every token to every device, and sums the devices' outputs.
    `all_to_all` sends a copy of a token to each of its experts.
    `ring` sends the same copies, from one neighbour distance after the other.
    `copies` sends one copy of a token to a device, for all its experts there (DeepEP)."""
    chunks: int = 1
    """all_to_all: the device's experts in this many parts.
    A part's rows travel while another part is computed."""
    buffer: float = 1.25
    """Slots of the send buffer, relative to what a balanced router needs.
    Rows that do not fit go in further rounds, so nothing is dropped."""
    node: int = 0
    """copies: devices of a node.
    A copy then goes to each node, and from there to the devices of the node.
    0: all devices are alike."""
    fp8: bool = field(default=False, metadata=MUST_MATCH)
    """Send activations to the experts in E4M3, in tiles of 1x128 with a scale.
    Gradients and outputs travel in the compute dtype."""
    rebalance: int = 0
    """Steps after which experts are placed on devices anew, by the loads of these steps (EPLB).
    0: each device keeps its experts."""
    replicas: int = 0
    """rebalance: further copies of hot experts in a layer, over all devices of the axis `expert`.
    A device computes (experts + replicas) / expert of them."""
    moves: int = 0
    """rebalance: experts of a layer that may come to another device at a time.
    0: as many as a whole new plan wants."""

    def __post_init__(self) -> None:
        owner = "parallel.exchange"
        known_choices(owner, self)
        positive(owner, self, "chunks", "buffer")
        not_negative(owner, self, "node", "rebalance", "replicas", "moves")
        require(
            self.chunks == 1 or self.kind == "all_to_all",
            f"{owner}.chunks={self.chunks} needs kind=all_to_all, not {self.kind}",
        )
        require(
            self.node == 0 or self.kind == "copies",
            f"{owner}.node={self.node} needs kind=copies, not {self.kind}",
        )
        require(
            not self.fp8 or self.kind not in ("weights", "all_gather"),
            f"{owner}.fp8 needs kind=all_to_all, ring or copies, not {self.kind}",
        )
        require(
            self.rebalance == 0 or self.kind != "weights",
            f"{owner}.rebalance={self.rebalance} needs tokens that travel to experts: take another "
            f"{owner}.kind than weights",
        )
        for name in ("replicas", "moves"):
            value = getattr(self, name)
            require(
                value == 0 or self.rebalance > 0,
                f"{owner}.{name}={value} needs {owner}.rebalance, the steps between two placements",
            )

    def check(self, moe: MoEConfig, devices: int) -> None:
        """UserError: these experts do not spread over so many devices in this way.

        `devices` divides their number.
        """
        owner = "parallel.exchange"
        require(
            self.node == 0 or devices % self.node == 0,
            f"{owner}.node={self.node} does not divide parallel.expert={devices}",
        )
        if self.rebalance:
            self._check_replicas(moe, devices)
        own = (moe.experts + self.replicas) // devices
        require(
            own % self.chunks == 0,
            f"{owner}.chunks={self.chunks} does not divide the {own} experts of a device",
        )

    def _check_replicas(self, moe: MoEConfig, devices: int) -> None:
        owner = "parallel.exchange"
        require(
            devices > 1,
            f"{owner}.rebalance={self.rebalance} needs several devices to place experts on: set "
            "parallel.expert",
        )
        require(
            self.replicas % devices == 0,
            f"{owner}.replicas={self.replicas} does not divide over parallel.expert={devices} "
            f"devices: make it a multiple of {devices}",
        )
        # No device has two copies of one expert, and an expert of a group stays on the group's
        # node (placement.eplb).
        most = moe.experts * (devices // self.hierarchy(moe, devices)[1] - 1)
        require(
            self.replicas <= most,
            f"{owner}.replicas={self.replicas} would put an expert twice on one device: take at "
            f"most {most}",
        )

    def hierarchy(self, moe: MoEConfig, devices: int) -> tuple[int, int]:
        """(groups, nodes) of the placement: (1, 1) unless the groups divide over the nodes."""
        nodes = devices // self.node if self.node else 1
        return (moe.groups, nodes) if moe.groups % nodes == 0 else (1, 1)
