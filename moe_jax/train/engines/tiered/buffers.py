"""Layer buffers: the matrices of all experts of a layer on the device, two layers at a time."""

from concurrent.futures import Future
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from moe_jax.model.trunk import Matrices
from moe_jax.train.engines.tiered.rows import RowShapes


@dataclass(eq=False)
class LayerBuffer:
    """[E, …] arrays, in which each expert has its own index.

    Rows that are not `filled` hold any finite values. The mixture may compute with them, at
    weight 0, which a NaN would survive.
    """

    matrices: Matrices
    """Replaced by the thread "bring" alone."""
    filled: Bool[np.ndarray, "E"]
    """Experts that are there or on their way. Set by the update's thread alone."""
    layer: int = -1
    job: "Future[None] | None" = None
    """The last transfer to this buffer. It waits for the one before it."""

    @property
    def busy(self) -> bool:
        return self.job is not None and not self.job.done()

    def wait(self) -> None:
        """Returns when the last transfer is done. UserError: it failed."""
        if self.job is not None:
            self.job.result()


class LayerBuffers:
    """Two buffers: one layer computes while the experts of the next one are brought."""

    def __init__(self, shapes: RowShapes, experts: int) -> None:
        self._shapes = shapes
        self._experts = experts
        self._buffers: list[LayerBuffer] = []
        """In order of use, the latest last."""

    def of(self, layer: int) -> LayerBuffer:
        """The buffer of `layer`. If there is none, the least recently used one, emptied."""
        for buffer in self._buffers:
            if buffer.layer == layer:
                self._buffers.remove(buffer)
                self._buffers.append(buffer)
                return buffer
        buffer = self._new() if len(self._buffers) < 2 else self._buffers.pop(0)
        buffer.wait()  # its last transfer may still write to it
        buffer.layer = layer
        buffer.job = None
        buffer.filled[:] = False
        self._buffers.append(buffer)
        return buffer

    def empty(self) -> None:
        """Marks all rows as stale, because parameters have changed."""
        assert not self.busy(), "an update ended while experts were still being brought"
        for buffer in self._buffers:
            buffer.filled[:] = False

    def busy(self, layer: int | None = None) -> bool:
        """Whether experts of `layer` (unset: of any) are being brought."""
        return any(buffer.busy for buffer in self._buffers if layer in (None, buffer.layer))

    def wait(self) -> None:
        """Returns when nothing is being brought."""
        for buffer in self._buffers:
            buffer.wait()

    def _new(self) -> LayerBuffer:
        shapes = self._shapes.parameters
        matrices = tuple(jnp.zeros((self._experts, *s.shape), s.dtype) for s in shapes)
        return LayerBuffer(matrices, np.zeros(self._experts, bool))
