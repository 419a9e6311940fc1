"""Rows on their way to the tiers below."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from moe_jax.model.trunk import Matrices
from moe_jax.placement.threads import OwnerThread
from moe_jax.train.engines.tiered.threads import Threads


class WriteQueue:
    """Writes that one thread hands to the writing thread, at most `limit` ahead of it.

    Any thread may `wait` for them. Only the owner submits (AssertionError).
    """

    def __init__(self, threads: Threads, layers: int, limit: int) -> None:
        self._threads = threads
        self._limit = limit
        self._outstanding: deque[Future[None]] = deque()
        self._of_layer: list[tuple[Future[None], ...]] = [()] * layers
        self._owner = OwnerThread("a queue of writes")

    def submit(self, layer: int, write: Callable[[], None], arrays: Matrices) -> None:
        """Has `write` called once `arrays` are computed. Waits while the queue is full.

        UserError: an earlier write failed.
        """
        self._owner.check()
        future = self._threads.submit("write", write, computed=arrays)
        # A new tuple each time, so that a thread in `wait` never sees one that changes. A write
        # that failed stays in it: whoever reads its rows must hear of it.
        unfinished = [f for f in self._of_layer[layer] if not f.done() or f.exception()]
        self._of_layer[layer] = (*unfinished, future)
        self._outstanding.append(future)
        while len(self._outstanding) > self._limit:
            self._outstanding.popleft().result()

    def wait(self, layer: int) -> None:
        """Returns when the rows of `layer` are written. UserError: a write failed."""
        for future in self._of_layer[layer]:
            future.result()

    def wait_all(self) -> None:
        """Returns when everything is written. UserError: a write failed."""
        for layer in range(len(self._of_layer)):
            self.wait(layer)
