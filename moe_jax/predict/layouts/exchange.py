"""Seconds in which rows reach their experts on other devices, or come back.

A token has K of E experts, which lie on X devices of k nodes with m devices each. It sends

    rows      K rows, wherever its experts are
    copies    one row to each device that has any of its experts. Over nodes: one row to each node
              over the network, from where it goes to the devices (parallel.exchange.node)

and gets as many back. A device that is one of n equal ones has none of the K experts with the
probability C(E - E/n, K) / C(E, K), if all experts are equally likely. If a token may use L nodes
alone, it has K experts of the E L/k that are there.
"""

from dataclasses import dataclass
from math import comb
from typing import NamedTuple

from moe_jax.predict.collectives import RING_BASE, Fabric, Group

FP8 = 1 + 1 / 128
"""Bytes of a number in FP8, with a scale for 128 of them."""
ROUNDING = 3
"""Bytes of memory traffic for a received number in FP8: read one, write two in bfloat16."""
NUMBER = 2
"""Bytes of a bfloat16 number."""


@dataclass(frozen=True)
class Exchange:
    """How rows travel (config.exchange)."""

    copies: bool = False
    """One row for a device, and for a node, instead of one for each expert."""
    nodes: int = 0
    """Nodes that a token may use. 0: all."""
    fp8: bool = False
    """Activations travel to the experts in FP8. Results and gradients travel in bfloat16."""
    chunks: int = 8
    """Parts of a device's experts that travel and compute in turn. At most its experts."""


class Rows(NamedTuple):
    """Rows of one token that a device sends."""

    inside: float
    """To other devices of nodes."""
    outside: float
    """Over the network."""
    received: float
    """That the experts of a device receive, in the mean over devices."""


def rows_of_token(exchange: Exchange, experts: int, per_token: int, group: Group) -> Rows:
    """Expected rows. The experts are split over the group."""
    E = experts
    K = per_token
    X = group.size
    m = group.inside
    k = group.nodes
    limit = min(exchange.nodes or k, k)
    if not exchange.copies:
        return Rows(K * (m - 1) / X, K * (X - m) / X, K)
    reachable = E * limit // k
    device = limit / k * _some(reachable, E // X, K)
    node = limit / k * _some(reachable, E // k, K)
    # A row comes to the device with the sender's number in the node, and goes on from there.
    return Rows(X * device * (m - 1) / m, (k - 1) * node, X * device)


def _some(experts: int, own: int, per_token: int) -> float:
    """The probability that K of so many experts hit any of `own`."""
    return 1 - comb(experts - own, per_token) / comb(experts, per_token)


def exchange_seconds(rows: Rows, bytes_of_row: float, group: Group, fabric: Fabric) -> float:
    """Of all tokens, `bytes_of_row` for all of them together. Both links work at once."""
    if group.size == 1:
        return 0.0
    inside = rows.inside * bytes_of_row / fabric.inside.rate
    outside = rows.outside * bytes_of_row / fabric.outside.rate
    link = fabric.inside if group.nodes == 1 else fabric.outside
    return RING_BASE + link.hop + max(inside, outside)
