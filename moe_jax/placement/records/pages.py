"""Page-aligned memory, which reads and writes around the page cache (O_DIRECT) need."""

import mmap
import threading

PAGE = 4096
"""Bytes. O_DIRECT wants file offsets, lengths and addresses to be multiples of the disk's logical
block, 512 or 4096 bytes. A page is a multiple of both."""


def whole_pages(size: int) -> int:
    """`size` bytes rounded up to pages."""
    return -(-size // PAGE) * PAGE


def page_memory(size: int) -> memoryview:
    """Zeroed memory that begins at a page."""
    return memoryview(mmap.mmap(-1, size))


class ThreadBuffer:
    """Page-aligned scratch memory, one buffer for each thread that asks.

    A thread's next call overwrites what its last call returned.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._local = threading.local()

    def get(self, size: int) -> memoryview:
        """`size` bytes of the calling thread's buffer."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = page_memory(max(self._least, size))
            self._local.buffer = buffer
        return buffer[:size]
