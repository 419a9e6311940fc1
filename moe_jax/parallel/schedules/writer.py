"""Writes the order of a device that has two chunks, as the papers tell it: F0, F1, B1, W, …"""

from collections import deque
from collections.abc import Sequence

from moe_jax.parallel.schedules.operations import Kind, Operation, Order, Step


class OrderWriter:
    """Counts the micro-batches of each chunk, and keeps the weights that are still to be done."""

    def __init__(self, firsts: Sequence[int], count: int) -> None:
        """`firsts` are the first micro-batches of the chunks. Each chunk has `count` of them."""
        self.steps: list[Step] = []
        self._firsts = firsts
        self._count = count
        self._done: dict[tuple[Kind, int], int] = {}
        self._weights: deque[Operation] = deque()

    def forward(self, chunk: int) -> None:
        """The chunk's next forward, if it has one left."""
        if self.forwards(chunk) < self._count:
            self.steps.append((self._next(Kind.FORWARD, chunk),))

    def backward(self, chunk: int) -> None:
        """The chunk's next backward, whole."""
        self.steps.append((self._next(Kind.BACKWARD, chunk),))

    def backward_input(self, chunk: int) -> None:
        """The chunk's next backward to the input. Its weights wait for `weight`."""
        operation = self._next(Kind.BACKWARD, chunk)
        self.steps.append((operation._replace(kind=Kind.BACKWARD_INPUT),))
        self._weights.append(operation._replace(kind=Kind.BACKWARD_WEIGHT))

    def weight(self) -> None:
        """The weights that have waited longest."""
        self.steps.append((self._weights.popleft(),))

    def overlapped(self, forward: int, backward: int) -> None:
        """The next forward of a chunk and the next backward of the other one, at the same time."""
        pair = (self._next(Kind.FORWARD, forward), self._next(Kind.BACKWARD, backward))
        self.steps.append(pair)

    def forwards(self, chunk: int) -> int:
        """Forwards of a chunk that are written."""
        return self._done.get((Kind.FORWARD, chunk), 0)

    def finish(self) -> Order:
        """The order, with all weights that were waiting at its end."""
        while self._weights:
            self.weight()
        return tuple(self.steps)

    def _next(self, kind: Kind, chunk: int) -> Operation:
        number = self._done.get((kind, chunk), 0)
        self._done[kind, chunk] = number + 1
        return Operation(kind, self._firsts[chunk] + number, chunk)
