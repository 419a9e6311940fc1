"""The experts in the devices' slots while a run trains: the first placement, and those by load."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

from moe_jax.config import MoEConfig, ParallelConfig
from moe_jax.placement.eplb import placement_of, rebalance
from moe_jax.placement.eplb_steps import copies_between, improve


@dataclass(frozen=True)
class SlotPlanner:
    """Places the experts of a run on the devices of its axis `expert`.

    Device d has the slots d·(slots/devices) … (d+1)·(slots/devices) - 1 of each layer. Every expert
    is in one slot at least, and no device has an expert twice.
    """

    experts: int
    slots: int
    groups: int
    nodes: int
    devices: int
    moves: int
    """Experts of a layer that may come to another device at a time. 0: any number."""

    @classmethod
    def of(cls, moe: MoEConfig, parallel: ParallelConfig) -> "SlotPlanner":
        """That of a run with these settings."""
        exchange = parallel.exchange
        groups, nodes = exchange.hierarchy(moe, parallel.expert)
        slots = moe.experts + exchange.replicas
        return cls(moe.experts, slots, groups, nodes, parallel.expert, exchange.moves)

    def first(self, layers: int) -> Int[np.ndarray, "layers slots"]:
        """The placement before any load is known: as if all experts had the same."""
        return self._new(np.ones((layers, self.experts)))

    def next(
        self, loads: Num[np.ndarray, "layers E"], slots: Int[np.ndarray, "layers slots"]
    ) -> Int[np.ndarray, "layers slots"]:
        """The placement for these loads, after the one with these slots."""
        if not self.moves:
            return self._new(loads)
        before = placement_of(slots, self.experts)
        after = improve(loads, before, self.nodes, self.devices, self.moves)
        return after.placement.physical_to_logical

    @property
    def described(self) -> dict[str, int]:
        """What a placement must have in common with this planner, so that it may go on from it."""
        return {name: value for name, value in vars(self).items() if name != "moves"}

    def moved(
        self, before: Int[np.ndarray, "layers slots"], after: Int[np.ndarray, "layers slots"]
    ) -> int:
        """Experts that came to another device, in all layers."""
        return int(copies_between(before, after, self.devices).sum())

    def _new(self, loads: Num[np.ndarray, "layers E"]) -> Int[np.ndarray, "layers slots"]:
        placement = rebalance(loads, self.slots, self.groups, self.nodes, self.devices)
        return placement.physical_to_logical
