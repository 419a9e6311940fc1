"""The log of the updates that each expert still lacks.

An update that touches an expert only leaves its gradient. The expert is brought up to date when it
is next needed. So the backward pass writes gradients alone, and clipping by the global norm, which
is known only after it, needs no second pass.
"""

import numpy as np
from jaxtyping import Int

from moe_jax.train.engines.tiered.chunks import padded
from moe_jax.train.engines.tiered.rows import PendingUpdates


class UpdateLog:
    """The updates that the rows of layers · experts reflect, and whose gradients they hold.

    `exact`: a row goes through every update, also those without a gradient of its own (dense
    AdamW). Otherwise through those with a gradient alone (lazy AdamW).

    Threads: the update's thread and the one that brings may use it together for different layers.
    """

    def __init__(self, layers: int, experts: int, *, exact: bool) -> None:
        self.updates = 0
        """Number of updates so far."""
        self._exact = exact
        self._gradient_update = np.full((layers, experts), -1, np.int32)
        """The update that the gradient row belongs to. -1: the row is void or used up."""
        self._norm = np.zeros((layers, experts), np.float32)
        """The global gradient norm of that update."""
        self._reflected = np.zeros((layers, experts), np.int32)
        """exact: updates that the rows reflect."""

    def restore(self, updates: int) -> None:
        """All rows reflect `updates` updates."""
        self.updates = updates
        self._reflected[:] = updates

    def void(self, layer: int, ids: Int[np.ndarray, "n"]) -> None:
        """Marks the gradients of `ids` as void, because new ones are about to be written.

        The new ones do not count before `record`: the update may still turn out not to be finite.
        """
        self._gradient_update[layer, ids] = -1

    def record(self, active: list[Int[np.ndarray, "n"]], norm: float) -> None:
        """One more update is done, to which the gradients of each layer's `active` belong."""
        for layer, ids in enumerate(active):
            self._gradient_update[layer, ids] = self.updates
            self._norm[layer, ids] = norm
        self.updates += 1

    def applied(self, layer: int, ids: Int[np.ndarray, "n"]) -> None:
        """The rows of `ids` are up to date."""
        self._gradient_update[layer, ids] = -1
        self._reflected[layer, ids] = self.updates

    def pending(self, layer: int, ids: Int[np.ndarray, "n"], size: int = 0) -> PendingUpdates:
        """The updates that `ids` lack, padded to `size` rows that lack none."""
        gradient = self._gradient_update[layer, ids]
        if self._exact:
            start = self._reflected[layer, ids]
            stop = np.full_like(start, self.updates)
        else:
            # Lazy AdamW: the update of the gradient and no other one.
            start = np.maximum(gradient, 0)
            stop = gradient + 1  # 0 without a gradient: then nothing is pending
        # Padding rows have start = stop = 0, so `advance` leaves them alone.
        size = max(size, len(ids))
        return PendingUpdates(
            start=padded(start, size),
            stop=padded(np.maximum(start, stop), size),
            gradient_update=padded(gradient, size),
            norm=padded(self._norm[layer, ids], size),
        )
