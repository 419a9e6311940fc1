"""Who stays on the device: decisions on numbers of experts, without moving anything."""

from collections.abc import Collection
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.config import require
from moe_jax.placement.place import Change, Placement, Scope
from moe_jax.placement.policy import Policy

Source = Literal["resident", "predicted", "host", "low_bit", "missing"]
"""How a use is served: resident on the device, arriving there on a prediction, computed in host
memory, by its 8-bit copy, or brought to the device while the caller waits."""


class LookAhead:
    """Prefetching that switches itself off: below a floor of recall it only watches.

    recall: share of a layer's needed experts that were predicted, averaged over about 50 steps.
    """

    def __init__(self, experts: int, recall_floor: float) -> None:
        self.experts = experts
        self.recall_floor = recall_floor
        self.recall = 1.0
        self._predicted: tuple[int, set[int]] | None = None

    @property
    def active(self) -> bool:
        return self.experts > 0 and self.recall >= self.recall_floor

    def predict(self, layer: int, experts: list[int]) -> None:
        """Remembers what `layer` will probably need."""
        self._predicted = layer, set(experts)

    def compare(self, layer: int, needed: list[int]) -> None:
        """Updates the recall by the experts that `layer` needs, if it was predicted."""
        predicted = self._predicted
        self._predicted = None
        if predicted is None or predicted[0] != layer or not needed:
            return
        recall = len(predicted[1] & set(needed)) / len(needed)
        self.recall += 0.02 * (recall - self.recall)


class Room(NamedTuple):
    """Places on the device."""

    slots: int
    """Experts that the budget holds."""
    capacity: int
    """Residents."""
    look_ahead: int
    """Experts fetched for the next layer."""


def divide_budget(
    slots: int, working_set: int, look_ahead: int, *, experts: int, layers: int, fixed: bool
) -> Room:
    """Divides `slots` into residents, predicted experts, and places for experts that pass through.

    `fixed`: residents never leave, so a whole working set is kept free for misses. Otherwise one
    free place is enough, because misses take the places of residents.
    """
    if slots >= layers * experts:
        return Room(layers * experts, layers * experts, 0)
    look_ahead = min(look_ahead, slots - working_set, experts)
    return Room(slots, slots - look_ahead - (working_set if fixed else 1), look_ahead)


class Residency:
    """Decides for every step which experts are served how, and which stay on the device."""

    def __init__(
        self,
        policy: Policy,
        layers: int,
        experts: int,
        room: Room,
        *,
        scope: Scope,
        recall_floor: float,
        compute_rows: float,
        low_bit_share: float,
    ) -> None:
        self.room = room
        self.ahead = LookAhead(room.look_ahead, recall_floor)
        self.placement = Placement(policy, layers, experts, room.capacity, scope)
        self._compute_rows = compute_rows
        self._low_bit_share = low_bit_share

    def classify(
        self,
        ids: list[int],
        resident: Collection[int],
        predicted: Collection[int],
        host: Collection[int],
        *,
        rows: Int[np.ndarray, "n"] | None,
        share: Float[np.ndarray, "n"] | None,
    ) -> dict[int, Source]:
        """How each of `ids` is served, in their order.

        `resident`, `predicted`, `host`: the experts that are on the device, on their way there, and
        in host memory. `rows` and `share` as ExpertStore.fetch.
        """
        sources: dict[int, Source] = {}
        for index, expert in enumerate(ids):
            tokens = 1 if rows is None else rows[index]
            if expert in resident:
                sources[expert] = "resident"
            elif expert in predicted:
                sources[expert] = "predicted"
            elif expert in host and tokens <= self._compute_rows:
                sources[expert] = "host"
            elif share is not None and share[index] < self._low_bit_share:
                sources[expert] = "low_bit"
            else:
                sources[expert] = "missing"
        return sources

    def evict(self, layer: int, needed: list[int], resident: Collection[int]) -> list[int]:
        """Residents that leave before a layer's experts come: there must be places for all that it
        needs, and for the next layer's predicted ones.

        An expert that is computed in host memory counts too: `settle` may promote it.
        """
        taken = len({*resident, *needed})
        short = taken - (self.room.slots - self.room.look_ahead)
        return self.placement.make_room(layer, short, needed) if short > 0 else []

    def settle(self, layer: int, experts: Int[np.ndarray, "n"], low_bit: Collection[int]) -> Change:
        """Who comes and who goes after a step. Experts served by `low_bit` copies never stay."""
        return self.placement.use(layer, experts, barred=low_bit)

    def best_absent(self, resident: Collection[int], count: int) -> list[int]:
        """The `count` experts of the highest scores that are not resident, the best first."""
        everything = np.arange(self.placement.policy.size)
        order = np.argsort(-self.placement.policy.score(everything), kind="stable").tolist()
        return [expert for expert in order if expert not in resident][:count]


def check_working_set(device_bytes: int, expert_bytes: int, working_set: int) -> None:
    """UserError: the budget is below one layer's working set."""
    require(
        device_bytes // expert_bytes >= working_set,
        f"placement.device_budget of {device_bytes} bytes is below one layer's working set: "
        f"{working_set} experts of {expert_bytes} bytes need at least {working_set * expert_bytes}",
    )
