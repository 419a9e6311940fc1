"""Who is resident: exact capacities, admission and eviction, replay of a trace, Belady's bound.

A step is one layer's turn: the distinct experts that its tokens need. Residents among them are
hits. The others pass through a buffer beside the residents, and afterwards each may take a place.
"""

from collections.abc import Collection, Iterable
from heapq import heapify, heappush, heapreplace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from moe_jax.config import require
from moe_jax.placement.policy import Policy

Scope = Literal["pool", "quota"]
Step = tuple[int, Int[np.ndarray, "n"]]
"""(layer, distinct experts of that layer, ascending)"""


class Change(NamedTuple):
    """What one step did. Experts are numbered over all layers."""

    hits: Int[np.ndarray, "hits"]
    misses: Int[np.ndarray, "misses"]
    admitted: list[int]
    evicted: list[int]


class Placement:
    """At most `capacity` residents of layers · experts, chosen by `policy`.

    `pool`: all layers share the capacity. `quota`: each has capacity // layers of it, the first
    ones take the remainder.
    """

    def __init__(
        self, policy: Policy, layers: int, experts: int, capacity: int, scope: Scope = "pool"
    ) -> None:
        require(capacity >= 0, f"placement capacity is {capacity}: it must not be negative")
        require(
            policy.size == layers * experts,
            f"the policy is for {policy.size} experts, not {layers} layers of {experts}",
        )
        require(scope in ("pool", "quota"), f"unknown scope '{scope}': use pool or quota")
        self.policy = policy
        self.layers = layers
        self.experts = experts
        self.scope = scope
        self.capacity = min(capacity, policy.size)
        self.resident = np.zeros(policy.size, bool)

    def room(self, layer: int) -> tuple[slice, int]:
        """The experts that compete with those of `layer`, and how many of them may stay."""
        if self.scope == "pool":
            return slice(0, self.policy.size), self.capacity
        share = self.capacity // self.layers + (layer < self.capacity % self.layers)
        return slice(layer * self.experts, (layer + 1) * self.experts), min(share, self.experts)

    def fill(self) -> list[int]:
        """Makes the experts of the highest scores resident and returns them: a static start."""
        self.resident[:] = False
        for layer in range(self.layers if self.scope == "quota" else 1):
            scope, room = self.room(layer)
            rivals = np.arange(self.policy.size)[scope]
            order = np.argsort(-self.policy.score(rivals), kind="stable")
            self.resident[rivals[order[:room]]] = True
        return np.flatnonzero(self.resident).tolist()

    def use(
        self, layer: int, experts: Int[np.ndarray, "n"], barred: Collection[int] = ()
    ) -> Change:
        """One step: `experts` of `layer`, distinct, are used. The `barred` ones, numbered over all
        layers, are not kept, whatever their scores."""
        ids = layer * self.experts + np.asarray(experts)
        self.policy.use(ids)
        inside = self.resident[ids]
        misses = ids[~inside]
        newcomers = [e for e in misses.tolist() if e not in barred]
        admitted, evicted = self._admit(layer, newcomers) if newcomers else ([], [])
        return Change(ids[inside], misses, admitted, evicted)

    def make_room(self, layer: int, count: int, keep: Collection[int]) -> list[int]:
        """Evicts the `count` residents of the lowest scores before `layer` needs their places.

        Those to `keep` stay. They come out of the layer's own quota if that is enough."""
        free = self.resident.copy()
        free[list(keep)] = False
        scope, _ = self.room(layer)
        if free[scope].sum() < count:
            scope = slice(0, self.policy.size)
        rivals = np.flatnonzero(free[scope]) + scope.start
        evicted = rivals[np.argsort(self.policy.score(rivals), kind="stable")[:count]]
        self.resident[evicted] = False
        return evicted.tolist()

    def _admit(self, layer: int, newcomers: list[int]) -> tuple[list[int], list[int]]:
        """(who comes, who leaves). One newcomer may push out another of the same step: neither
        then comes nor goes."""
        scope, room = self.room(layer)
        residents = np.flatnonzero(self.resident[scope]) + scope.start
        before = residents.tolist()
        heap = list(zip(self.policy.score(residents).tolist(), before, strict=True))
        heapify(heap)  # heap[0] has the lowest score, and of equal scores the lowest number
        for entry in zip(self.policy.score(np.array(newcomers)).tolist(), newcomers, strict=True):
            if len(heap) < room:
                heappush(heap, entry)
            elif room and entry[0] > (1 + self.policy.hysteresis) * heap[0][0]:
                heapreplace(heap, entry)
        after = {e for _, e in heap}
        evicted = sorted({*before} - after)
        admitted = sorted(after - {*before})
        self.resident[evicted] = False
        self.resident[admitted] = True
        return admitted, evicted


class Replay(NamedTuple):
    """Counts over a replayed trace."""

    uses: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """Hits of all uses, and 1 for no use at all."""
        return self.hits / self.uses if self.uses else 1.0


def replay(placement: Placement, steps: Iterable[Step]) -> Replay:
    """Runs the steps through the placement, whose policy keeps its statistics."""
    uses = hits = 0
    for layer, experts in steps:
        change = placement.use(layer, experts)
        uses += len(experts)
        hits += len(change.hits)
    return Replay(uses, hits)


def belady(steps: list[Step], layers: int, experts: int, capacity: int) -> Replay:
    """The most hits that any placement of `capacity` experts can have, knowing the future.

    After every step the experts that are needed soonest stay (Belady 1966, with the choice not to
    keep a newcomer). It begins with the best contents, so it bounds warm starts as well, and
    shares its capacity over layers, so it bounds quotas as well. It does not bound prefetching.
    """
    numbered = [layer * experts + np.asarray(chosen) for layer, chosen in steps]
    upcoming = _next_uses(numbered, layers * experts)
    next_use = np.full(layers * experts, len(steps))
    for index in range(len(numbered) - 1, -1, -1):
        next_use[numbered[index]] = index
    first = np.argsort(next_use, kind="stable")[:capacity]
    resident = np.zeros(layers * experts, bool)
    resident[first] = True
    uses = hits = 0
    for ids, after in zip(numbered, upcoming, strict=True):
        uses += len(ids)
        hits += int(resident[ids].sum())
        next_use[ids] = after
        resident[ids] = True
        present = np.flatnonzero(resident)
        if len(present) > capacity:
            resident[present[np.argsort(next_use[present], kind="stable")[capacity:]]] = False
    return Replay(uses, hits)


def _next_uses(numbered: list[np.ndarray], size: int) -> list[np.ndarray]:
    """For every step, when each of its experts is used next: a step's number, or their count."""
    soonest = np.full(size, len(numbered))
    uses: list[np.ndarray] = []
    for index in range(len(numbered) - 1, -1, -1):
        uses.append(soonest[numbered[index]].copy())
        soonest[numbered[index]] = index
    return uses[::-1]
