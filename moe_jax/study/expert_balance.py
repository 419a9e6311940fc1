"""How even the load of devices is when experts are placed by the load of the tokens before.

A recorded trace is cut into windows. The loads of one window give a placement (placement/eplb.py),
and the next window is counted on it, as in training or serving that rebalances every few steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.placement.eplb import (
    ExpertPlacement,
    device_loads,
    imbalance,
    placement_of,
    rebalance,
)
from moe_jax.placement.eplb_steps import copies_between, improve
from moe_jax.placement.trace import Trace


@dataclass(frozen=True)
class Devices:
    """The devices over which experts are placed."""

    devices: int = 8
    """Devices on all nodes."""
    nodes: int = 1
    """Machines."""
    groups: int = 1
    """Groups of experts. They stay on one node if they divide over the nodes."""
    spare: int = 1
    """Slots of a device for replicas, besides its share of the experts."""


@dataclass(frozen=True)
class BalanceReplay:
    """The highest load over the mean load of the devices, in every window but the first.

    A copy is an expert that a device must get before a window begins. The first placement counts
    none, so copies begin with the window after it.
    """

    before: Float[np.ndarray, "windows layers"]
    """Experts in the order of their numbers, no replicas."""
    packed: Float[np.ndarray, "windows layers"]
    """Placed by the window before, without replicas. It shows what placement alone gives."""
    after: Float[np.ndarray, "windows layers"]
    """Placed by the window before, with replicas in the spare slots."""
    once: Float[np.ndarray, "windows layers"]
    """Placed by the first window and never again, with replicas."""
    bounded: Float[np.ndarray, "windows layers"]
    """With replicas, from the placement before by a bounded number of copies a layer."""
    hindsight: Float[np.ndarray, "windows layers"]
    """Placed by the loads of the window itself, which no system knows beforehand."""
    copies: Int[np.ndarray, "windows layers"]
    """Copies of `after`."""
    bounded_copies: Int[np.ndarray, "windows layers"]
    """Copies of `bounded`."""


def window_loads(trace: Trace, window: int) -> Int[np.ndarray, "windows layers E"]:
    """Tokens of each expert in each whole window of `window` tokens.

    UserError: the trace has fewer than two windows.
    """
    windows = len(trace.chosen) // window
    require(
        windows >= 2,
        f"the trace has {len(trace.chosen)} tokens: two windows of {window} are needed",
    )
    parts = (trace.part(w * window, (w + 1) * window) for w in range(windows))
    counts = [part.frequency().reshape(trace.layers, trace.experts) for part in parts]
    return np.stack(counts)


def mixed(trace: Trace, length: int, seed: int) -> Trace:
    """The trace with its sequences of `length` tokens in a random order, as batches mix documents.

    What is left after the last whole sequence stays at the end.
    """
    tokens = np.arange(len(trace.chosen))
    count = len(tokens) // length
    order = np.random.default_rng(seed).permutation(count)
    tokens[: count * length] = (order[:, None] * length + np.arange(length)).ravel()
    return replace(trace, chosen=trace.chosen[tokens], domain=trace.domain[tokens])


def replay_balance(
    loads: Int[np.ndarray, "windows layers E"], on: Devices, most_copies: int
) -> BalanceReplay:
    """Counts every window on the placements that the window before would have given.

    UserError: sizes that do not divide (placement/eplb.py).
    """
    layers, experts = loads.shape[1:]
    require(
        experts % on.devices == 0,
        f"{experts} experts do not divide over {on.devices} devices",
    )
    slots = experts + on.spare * on.devices

    def planned(window: Int[np.ndarray, "layers E"], replicas: int = slots) -> ExpertPlacement:
        return rebalance(window, replicas, on.groups, on.nodes, on.devices)

    def counted(placement_for: Callable[[int], ExpertPlacement]) -> np.ndarray:
        return np.stack(
            [
                imbalance(device_loads(loads[w], placement_for(w), on.devices))
                for w in range(1, len(loads))
            ]
        )

    in_order = placement_of(np.tile(np.arange(experts), (layers, 1)), experts)
    plans = [planned(window) for window in loads]
    steps = _bounded_plans(loads, plans[0], on, most_copies)
    return BalanceReplay(
        before=counted(lambda w: in_order),
        packed=counted(lambda w: planned(loads[w - 1], experts)),
        after=counted(lambda w: plans[w - 1]),
        once=counted(lambda w: plans[0]),
        bounded=counted(lambda w: steps[w - 1]),
        hindsight=counted(lambda w: plans[w]),
        copies=_copies(plans, on.devices),
        bounded_copies=_copies(steps, on.devices),
    )


def _bounded_plans(
    loads: Int[np.ndarray, "windows layers E"], first: ExpertPlacement, on: Devices, most: int
) -> list[ExpertPlacement]:
    """The plan after each window, each near the one before."""
    plans = [first]
    nodes = on.nodes if on.groups % on.nodes == 0 else 1
    for window in loads[1:]:
        plans.append(improve(window, plans[-1], nodes, on.devices, most).placement)
    return plans


def _copies(plans: list[ExpertPlacement], devices: int) -> Int[np.ndarray, "windows layers"]:
    """Copies from each plan to the next. The last plan is for a window that is not there."""
    slots = [plan.physical_to_logical for plan in plans[:-1]]
    found = [copies_between(one, other, devices) for one, other in pairwise(slots)]
    return np.array(found, int).reshape(-1, len(slots[0]))
