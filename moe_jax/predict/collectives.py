"""Seconds of collectives from their bytes: a latency and a rate for each link (alpha-beta).

With n devices of which m share a node, on k nodes, rates R and hops h inside of a node (i) and
between nodes (o), and S bytes on each device before the collective:

    ring        all-gather sends (n-1) S, reduce-scatter (n-1)/n S, all-reduce twice as much
                seconds = base + (n-k) h_i + (k-1) h_o + sent / rate
                rate = R_i on one node, and min(R_i, m R_o) on several
    tree        all-reduce alone: base + 2 ((m-1) t_i + log2(k) t_o) + sent / (0.86 rate)
    all-to-all  base + h + max((m-1)/n S / R_i, (n-m)/n S / R_o)
    permute     base + h + S / R

Rings and trees are NCCL's (src/graph/tuning.cc), which takes the faster one. An all-reduce by the
switches (NVLink SHARP) is not modelled: it is up to 1.3 times as fast.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.predict.hardware import Card, Link

RING_BASE = 8.4e-6
"""Seconds of any ring, before its hops (NCCL, ring, Simple)."""
TREE_BASE = 14.0e-6
"""Seconds of any tree, before its hops (NCCL, tree, LL128)."""
TREE_SHARE = 0.92 * 120 / 128
"""Rate of a tree with LL128, relative to a ring's (NCCL)."""


@dataclass(frozen=True)
class Fabric:
    """How the devices of a machine are connected."""

    node: int
    """Devices of a node, numbered together."""
    inside: Link
    """Between devices of a node."""
    outside: Link
    """Between nodes."""

    @classmethod
    def of(cls, card: Card) -> "Fabric":
        """The connections of nodes of this card."""
        return cls(card.node, card.link, card.network)


@dataclass(frozen=True)
class Group:
    """The devices of a collective."""

    size: int
    """All of them (n)."""
    inside: int
    """Those that share a node (m)."""

    @property
    def nodes(self) -> int:
        """k"""
        return math.ceil(self.size / self.inside)

    @classmethod
    def of(cls, devices: Sequence[int], node: int) -> "Group":
        """The group of these devices, by their numbers. Nodes have `node` devices each."""
        first = devices[0] // node
        return cls(len(devices), sum(device // node == first for device in devices))


def collective_seconds(kind: str, size: float, group: Group, fabric: Fabric) -> float:
    """Seconds of a collective whose operand has `size` bytes on each device.

    `kind` is XLA's name: all-gather, reduce-scatter, all-reduce, all-to-all, ragged-all-to-all or
    collective-permute. Of the last one, `group` is a pair.
    """
    if group.size == 1:
        return 0.0
    if kind == "collective-permute":
        link = fabric.inside if group.nodes == 1 else fabric.outside
        return RING_BASE + link.hop + size / link.rate
    if kind in ("all-to-all", "ragged-all-to-all"):
        return _all_to_all(size, group, fabric)
    sent = sent_bytes(kind, size, group.size)
    seconds = _ring(sent, group, fabric, turns=2 if kind == "all-reduce" else 1)
    return min(seconds, _tree(sent, group, fabric)) if kind == "all-reduce" else seconds


def sent_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends in a collective over `devices` of them."""
    match kind:
        case "all-gather":
            return size * (devices - 1)
        case "all-reduce":
            return 2 * size * (devices - 1) / devices
        case "collective-permute":
            return size
        case _:  # reduce-scatter and all-to-all
            return size * (devices - 1) / devices


def _rate(group: Group, fabric: Fabric) -> float:
    if group.nodes == 1:
        return fabric.inside.rate
    own = fabric.inside.rate if group.inside > 1 else math.inf
    return min(own, group.inside * fabric.outside.rate)


def _ring(sent: float, group: Group, fabric: Fabric, turns: int) -> float:
    hops = (group.size - group.nodes) * fabric.inside.hop
    hops += (group.nodes - 1) * fabric.outside.hop
    return RING_BASE + turns * hops + sent / _rate(group, fabric)


def _tree(sent: float, group: Group, fabric: Fabric) -> float:
    hops = (group.inside - 1) * fabric.inside.tree_hop
    hops += math.log2(group.nodes) * fabric.outside.tree_hop
    return TREE_BASE + 2 * hops + sent / (TREE_SHARE * _rate(group, fabric))


def _all_to_all(size: float, group: Group, fabric: Fabric) -> float:
    part = size / group.size
    inside = (group.inside - 1) * part / fabric.inside.rate
    outside = (group.size - group.inside) * part / fabric.outside.rate
    link = fabric.inside if group.nodes == 1 else fabric.outside
    return RING_BASE + link.hop + max(inside, outside)
