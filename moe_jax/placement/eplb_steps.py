"""From one placement of experts to a better one by a bounded number of copies.

A new plan of moe_jax/placement/eplb.py may put every expert elsewhere. Here the placement changes
step by step: each step takes load from the device that has the most, and no more experts are copied
to other devices than the bound says.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.base.errors import require
from moe_jax.placement.eplb import ExpertPlacement, placement_of

Change = tuple[tuple[int, int], ...]
"""(slot, its new expert). Each pair is a copy of an expert to a device."""


class PlacementUpdate(NamedTuple):
    """A placement, and how far it is from the one before."""

    placement: ExpertPlacement
    copies: Int[np.ndarray, "layers"]
    """Experts that a device must get from another one."""


def copies_between(
    before: Int[np.ndarray, "layers slots"], after: Int[np.ndarray, "layers slots"], devices: int
) -> Int[np.ndarray, "layers"]:
    """How many experts a device has after and not before. The order of its slots does not count."""

    def new(one: Int[np.ndarray, "slots"], other: Int[np.ndarray, "slots"]) -> int:
        pairs = zip(one.reshape(devices, -1), other.reshape(devices, -1), strict=True)
        return sum(len(set(there.tolist()) - set(here.tolist())) for here, there in pairs)

    return np.array([new(one, other) for one, other in zip(before, after, strict=True)])


def improve(
    weights: Num[np.ndarray, "layers E"],
    placement: ExpertPlacement,
    nodes: int,
    devices: int,
    most_copies: int,
) -> PlacementUpdate:
    """A placement for the loads `weights`, at most `most_copies` copies a layer from `placement`.

    A step exchanges an expert of the device with the most load for another device's expert (two
    copies), or replaces a replica by another expert (one copy). It is the step after which the
    highest load, and then the sum of the squares, is smallest. The end is reached when no step
    helps. So the highest load never grows. Each expert stays on its node and keeps at least one
    replica, and no device gets two of one expert.

    UserError: sizes that do not fit, or loads that are negative or not finite.
    """
    loads = np.asarray(weights, float)
    slots = placement.physical_to_logical
    require(loads.shape == placement.counts.shape, f"weights have shape {loads.shape}")
    finite = bool(np.isfinite(loads).all() and (loads >= 0).all())
    require(finite, "weights hold a load that is negative or not finite")
    require(min(nodes, devices) > 0, "nodes and devices must be positive")
    divides = devices % nodes == 0 and slots.shape[1] % devices == 0
    require(divides, f"{slots.shape[1]} slots, {devices} devices and {nodes} nodes do not divide")
    require(most_copies >= 0, f"most_copies is {most_copies}: it must not be negative")
    rows = [
        _Layer(row, one, nodes, devices).improved(most_copies)
        for row, one in zip(loads, slots, strict=True)
    ]
    after = np.stack(rows)
    return PlacementUpdate(
        placement_of(after, loads.shape[1]), copies_between(slots, after, devices)
    )


class _Layer:
    """One layer's slots while they change."""

    def __init__(
        self,
        loads: Float[np.ndarray, "E"],
        slots: Int[np.ndarray, "slots"],
        nodes: int,
        devices: int,
    ) -> None:
        self.loads = loads
        self.slots = slots.copy()
        self.devices = devices
        self.per_device = len(slots) // devices
        self.per_node = devices // nodes

    def improved(self, copies: int) -> Int[np.ndarray, "slots"]:
        """The slots after the best steps, one after the other."""
        while copies:
            change = self._best(copies)
            if change is None:
                break
            for slot, expert in change:
                self.slots[slot] = expert
            copies -= len(change)
        return self.slots

    def _best(self, copies: int) -> Change | None:
        """The step after which the loads are most even, or None if none makes them more so."""
        best = None
        lowest = self._unevenness(())
        for change in self._changes():
            if len(change) <= copies:
                found = self._unevenness(change)
                if _less(found, lowest):
                    best = change
                    lowest = found
        return best

    def _unevenness(self, change: Change) -> tuple[float, float]:
        """(highest load, sum of squares) of the devices after a change.

        The squares count where several devices have the highest load, and a step lowers only one.
        """
        loads = self._device_loads(change)
        return float(loads.max()), float((loads**2).sum())

    def _device_loads(self, change: Change) -> Float[np.ndarray, "G"]:
        slots = self.slots.copy()
        for slot, expert in change:
            slots[slot] = expert
        counts = np.bincount(slots, minlength=len(self.loads))
        return (self.loads / np.maximum(counts, 1))[slots].reshape(self.devices, -1).sum(-1)

    def _changes(self) -> Iterator[Change]:
        """Every step that takes load from the device with the most."""
        hot = int(self._device_loads(()).argmax())
        node = hot // self.per_node
        counts = np.bincount(self.slots, minlength=len(self.loads))
        own = self._slots_of(hot)
        others = [
            slot
            for device in range(node * self.per_node, (node + 1) * self.per_node)
            if device != hot
            for slot in self._slots_of(device)
        ]
        for there in others:
            far = int(self.slots[there])
            on_far = self.slots[self._slots_of(there // self.per_device)]
            fits_here = far not in self.slots[own]
            for here in own:
                near = int(self.slots[here])
                fits_there = near not in on_far
                if fits_there and fits_here:
                    yield (here, far), (there, near)
                if fits_there and counts[far] > 1:
                    yield ((there, near),)
                if fits_here and counts[near] > 1:
                    yield ((here, far),)

    def _slots_of(self, device: int) -> list[int]:
        return list(range(device * self.per_device, (device + 1) * self.per_device))


def _less(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether the first is lower by more than the rounding of sums: steps must not undo another."""
    for a, b in zip(one, other, strict=True):
        if not math.isclose(a, b, rel_tol=1e-9):
            return a < b
    return False
