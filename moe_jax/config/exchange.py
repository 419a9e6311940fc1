"""How tokens reach experts that lie on other devices."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import known_choices, not_negative, positive
from moe_jax.config.codec import MUST_MATCH


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

    def __post_init__(self) -> None:
        owner = "parallel.exchange"
        known_choices(owner, self)
        positive(owner, self, "chunks", "buffer")
        not_negative(owner, self, "node")
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

    def check(self, experts: int, devices: int) -> None:
        """UserError: so many experts do not spread over so many devices in this way.

        `devices` divides `experts`.
        """
        owner = "parallel.exchange"
        own = experts // devices
        require(
            own % self.chunks == 0,
            f"{owner}.chunks={self.chunks} does not divide the {own} experts of a device",
        )
        require(
            self.node == 0 or devices % self.node == 0,
            f"{owner}.node={self.node} does not divide parallel.expert={devices}",
        )
