"""Experts on devices by load: replicas of hot experts, and an even load of every device.

The algorithm is DeepSeek's expert-parallelism load balancer (deepseek-ai/EPLB, DeepSeek-V3 report
section 3.4.2), with one addition: no device gets two replicas of the same expert. Where this holds
for the original's result, ours is the same, number for number.

Loads are float32 as in the original, because ties depend on the rounding. The replicas of an expert
share its load evenly.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.base.errors import require


class ExpertPlacement(NamedTuple):
    """Where the experts of each layer are. A slot is a place for one expert on a device.

    Device d has the slots d·(slots/devices) … (d+1)·(slots/devices) - 1.
    """

    physical_to_logical: Int[np.ndarray, "layers slots"]
    """The expert in each slot."""
    logical_to_physical: Int[np.ndarray, "layers E replicas"]
    """The slots of each expert's replicas, then -1. `replicas` is the largest number of any."""
    counts: Int[np.ndarray, "layers E"]
    """Replicas of each expert."""


def rebalance(
    weights: Num[np.ndarray, "layers E"],
    replicas: int,
    groups: int,
    nodes: int,
    devices: int,
) -> ExpertPlacement:
    """A placement of all experts for the loads `weights`, such as tokens of the last steps.

    replicas: slots of a layer, over all devices.
    groups: groups of experts that the router knows. If they divide evenly over the nodes, a group
        stays on one node (hierarchical). Otherwise any expert may be anywhere (global).
    nodes, devices: machines, and devices on all of them.

    1. Groups are packed to nodes by their summed load.
    2. On a node, each further slot goes to the expert with the highest load a replica.
    3. A node's replicas are packed to its devices, the heaviest first.

    UserError: sizes that do not divide, loads that are negative or not finite, or more slots than
    experts could fill without two replicas on one device.
    """
    loads = np.asarray(weights, np.float32)
    _check(loads, replicas, (groups, nodes, devices))
    if groups % nodes:
        groups = 1
        nodes = 1
    layers = [_layer(row, replicas, (groups, nodes, devices)) for row in loads]
    physical = np.stack([experts for experts, _ in layers])
    ranks = np.stack([rank for _, rank in layers])
    return _placement(physical, ranks, loads.shape[1])


def placement_of(physical: Int[np.ndarray, "layers slots"], experts: int) -> ExpertPlacement:
    """The three arrays for the experts in the slots. Replicas are numbered in the slots' order.

    UserError: an expert is nowhere, or there is no such expert.
    """
    low = int(physical.min())
    high = int(physical.max())
    require(low >= 0 and high < experts, f"experts {low} … {high} are not in 0 … {experts - 1}")
    placement = _placement(physical, np.stack([_ranks(row) for row in physical]), experts)
    missing = np.argwhere(placement.counts == 0)
    require(len(missing) == 0, f"layer and expert {missing[:1].tolist()} are in no slot")
    return placement


def _placement(
    physical: Int[np.ndarray, "layers slots"], ranks: Int[np.ndarray, "layers slots"], experts: int
) -> ExpertPlacement:
    layers, slots = physical.shape
    counts = np.stack([np.bincount(row, minlength=experts) for row in physical])
    logical = np.full((layers, experts, int(counts.max())), -1, np.int64)
    logical[np.arange(layers)[:, None], physical, ranks] = np.arange(slots)
    return ExpertPlacement(physical, logical, counts)


def _ranks(experts: Int[np.ndarray, "slots"]) -> Int[np.ndarray, "slots"]:
    """How often each slot's expert came before."""
    seen: Counter[int] = Counter()
    ranks = []
    for expert in experts.tolist():
        ranks.append(seen[expert])
        seen[expert] += 1
    return np.array(ranks)


def device_loads(
    weights: Num[np.ndarray, "layers E"], placement: ExpertPlacement, devices: int
) -> Float[np.ndarray, "layers G"]:
    """The load of each device."""
    shares = np.asarray(weights, float) / placement.counts
    slots = np.take_along_axis(shares, placement.physical_to_logical, axis=1)
    return slots.reshape(len(slots), devices, -1).sum(-1)


def imbalance(loads: Float[np.ndarray, "layers G"]) -> Float[np.ndarray, "layers"]:
    """The highest load over the mean load of each layer. 1 is even, and so is a layer without load.

    All devices wait for the one with the most. So it is how much longer a layer takes.
    """
    mean = loads.mean(-1)
    return np.where(mean > 0, loads.max(-1) / np.maximum(mean, 1e-30), 1.0)


def _check(
    loads: Float[np.ndarray, "layers E"], replicas: int, sizes: tuple[int, int, int]
) -> None:
    groups, nodes, devices = sizes
    require(
        loads.ndim == 2 and loads.size > 0, f"weights have shape {loads.shape}, not [layers, E]"
    )
    require(min(replicas, *sizes) > 0, "replicas, groups, nodes and devices must be positive")
    require(
        bool(np.isfinite(loads).all() and (loads >= 0).all()),
        "weights hold a load that is negative or not finite",
    )
    experts = loads.shape[1]
    require(experts % groups == 0, f"{experts} experts do not divide into {groups} groups")
    require(devices % nodes == 0, f"{devices} devices do not divide over {nodes} nodes")
    require(replicas % devices == 0, f"{replicas} replicas do not divide over {devices} devices")
    require(replicas >= experts, f"{replicas} replicas are fewer than the {experts} experts")
    # In a node there are E/nodes experts, each with at most one replica on a device.
    require(
        replicas <= experts * devices // (nodes if groups % nodes == 0 else 1),
        f"{replicas} replicas of {experts} experts on {devices} devices and {nodes} nodes: "
        "some device would have two of one expert, so take fewer replicas",
    )


def _layer(
    loads: Float[np.ndarray, "E"], replicas: int, sizes: tuple[int, int, int]
) -> tuple[Int[np.ndarray, "slots"], Int[np.ndarray, "slots"]]:
    """The expert in each slot of one layer, and which of its replicas it is."""
    groups, nodes, devices = sizes
    members = np.arange(len(loads)).reshape(groups, -1)
    group_loads = loads.reshape(groups, -1).sum(-1)
    slots = []
    ranks = []
    for node in balanced_packing(group_loads, nodes):
        experts = members[node].ravel()
        per_node = devices // nodes
        own = replicate(loads[experts], replicas // nodes, most=per_node)
        counts = np.bincount(own, minlength=len(experts)).astype(np.float32)
        packed = balanced_packing((loads[experts] / counts)[own], per_node, own)
        order = np.array(packed).ravel()
        slots.append(experts[own[order]])
        ranks.append(_ranks(own)[order])
    return np.concatenate(slots), np.concatenate(ranks)


def replicate(
    loads: Float[np.ndarray, "E"], slots: int, most: int | None = None
) -> Int[np.ndarray, "slots"]:
    """The expert of each slot: each one once, then again and again the one with the most load a
    replica, the first of equals. No expert gets more than `most` replicas.
    """
    experts = list(range(len(loads)))
    counts = np.ones(len(loads), np.float32)
    while len(experts) < slots:
        shares = loads / counts
        if most is not None:
            shares = np.where(counts < most, shares, -1.0)
        hottest = int(shares.argmax())
        experts.append(hottest)
        counts[hottest] += 1
    return np.array(experts)


def balanced_packing(
    weights: Float[np.ndarray, "n"], packs: int, labels: Int[np.ndarray, "n"] | None = None
) -> list[list[int]]:
    """Items in packs of equally many, each pack in the order of its packing.

    The heaviest item comes first. Each goes to the lightest pack with room, the first of equals.
    With `labels`, a pack takes each label once. No label may have more items than there are packs.
    """
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(len(weights))]
    packed: list[list[int]] = [[] for _ in range(packs)]
    totals = np.zeros(packs, np.float32)
    for item in np.argsort(-weights, kind="stable").tolist():
        free = [p for p in range(packs) if len(packed[p]) < room]
        if labels is not None:
            without = [p for p in free if labels[item] not in labels[packed[p]]]
            if not without:
                _make_room(packed, totals, (weights, labels), (item, free[0]))
                continue
            free = without
        pack = min(free, key=lambda p: totals[p])
        packed[pack].append(item)
        totals[pack] += weights[item]
    return packed


def _make_room(
    packed: list[list[int]],
    totals: Float[np.ndarray, "n"],
    items: tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]],
    late: tuple[int, int],
) -> None:
    """Packs an item whose label is in every pack that has room: another item moves for it.

    A full pack without the label exists, because a label has at most as many items as there are
    packs. It has an item whose label the pack with room lacks: that pack has fewer items, and one
    of them has the label in question.
    """
    weights, labels = items
    item, open_pack = late
    best = (math.inf, 0, 0)
    for pack, there in enumerate(packed):
        if pack == open_pack or labels[item] in labels[there]:
            continue
        for position, other in enumerate(there):
            if labels[other] not in labels[packed[open_pack]]:
                given = totals[pack] - weights[other] + weights[item]
                highest = max(given, totals[open_pack] + weights[other])
                best = min(best, (float(highest), pack, position))
    _, pack, position = best
    other = packed[pack][position]
    packed[pack][position] = item
    packed[open_pack].append(other)
    totals[pack] += weights[item] - weights[other]
    totals[open_pack] += weights[other]
