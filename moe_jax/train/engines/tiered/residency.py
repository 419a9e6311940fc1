"""Decides which experts of a model in training stay on the device, and which in host memory."""

import numpy as np
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.placement.place import Placement
from moe_jax.placement.policy import make_policy
from moe_jax.train.engines.tiered.chunks import Sizes

DECIDE_EVERY = 50
"""Updates between two decisions on residents. A change waits for all transfers, so it is rare."""
HYSTERESIS = 0.25
"""A newcomer's score must exceed a resident's by this fraction, or experts with nearly equal scores
would change places at every decision."""


class Residency:
    """Decides by the policy, with a quota for each layer. It moves nothing."""

    def __init__(self, config: TrainConfig, sizes: Sizes) -> None:
        name = config.placement.policy
        policy = make_policy(name, sizes.layers * sizes.experts, sizes.layers)
        policy.hysteresis = HYSTERESIS if name != "lru" else 0.0  # a time has no fraction
        capacity = sizes.quota * sizes.layers
        self.placement = Placement(policy, sizes.layers, sizes.experts, capacity, "quota")
        self.placement.fill()
        self._experts = sizes.experts
        self._host = sizes.host
        self._tried = 0

    def resident_ids(self, layer: int) -> Int[np.ndarray, "R"]:
        """The residents of a layer, ascending."""
        start = layer * self._experts
        return np.flatnonzero(self.placement.resident[start : start + self._experts])

    def host_ids(self) -> Int[np.ndarray, "n"]:
        """The experts with the highest scores that are not resident, as many as host memory holds.

        They are numbered layer · E + expert, in ascending order.
        """
        below = np.flatnonzero(~self.placement.resident)
        order = np.argsort(-self.placement.policy.score(below), kind="stable")
        return np.sort(below[order[: self._host]])

    def observe(self, active: list[Int[np.ndarray, "n"]]) -> list[int] | None:
        """Counts an update's uses, and decides every DECIDE_EVERY updates.

        Returns the layers whose residents change, and None where nothing was decided.
        """
        self._tried += 1
        if self._tried % DECIDE_EVERY:
            for layer, ids in enumerate(active):
                self.placement.policy.use(layer * self._experts + ids)
            return None
        changes = [self.placement.use(layer, ids) for layer, ids in enumerate(active)]
        return [layer for layer, change in enumerate(changes) if change.admitted]
