"""The L2 cache, simulated: least recently used, in pieces that are read whole."""

from collections import OrderedDict
from collections.abc import Hashable


class Cache:
    """Counts the bytes that come from DRAM."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.read_bytes = 0.0
        self._cached = 0.0
        # The least recently used piece is first.
        self._pieces: OrderedDict[Hashable, float] = OrderedDict()

    def read(self, piece: Hashable, size: float) -> None:
        """Reads a piece of so many bytes, from DRAM if the cache lacks it."""
        if piece in self._pieces:
            self._pieces.move_to_end(piece)
            return
        self._pieces[piece] = size
        self._cached += size
        self.read_bytes += size

    def evict(self) -> None:
        """Drops what does not fit. It is called after a wave of tiles and not within it, because
        the tiles of a wave read at the same time."""
        while self._cached > self.size and self._pieces:
            self._cached -= self._pieces.popitem(last=False)[1]
