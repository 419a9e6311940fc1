"""Assertions about threads: who may call an object, and who may use a record at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int


class OwnerThread:
    """Asserts that all calls of an object come from one thread: the one that calls first.

    The first call decides, and not the constructor, because a worker's object is built by the
    thread that starts the worker.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._owner: int | None = None

    def check(self) -> None:
        """AssertionError: another thread has called before."""
        caller = threading.get_ident()
        if self._owner is None:
            self._owner = caller
        assert self._owner == caller, f"{self._what} was called from a second thread"


class AccessGuard:
    """Asserts that nobody uses a record while another thread changes it.

    It never blocks. An overlap is a mistake in the order of reads and writes, and waiting here
    would hide that mistake.
    """

    def __init__(self, what: str, size: int) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._users = np.zeros(size, np.int32)
        """Of each record: the number of shared users, or -1 for an exclusive one."""

    @contextmanager
    def shared(self, records: Int[np.ndarray, "n"]) -> Iterator[None]:
        """Several threads may hold the same (distinct) records together."""
        with self._lock:
            assert (self._users[records] >= 0).all(), f"{self._what}: used while being changed"
            self._users[records] += 1
        try:
            yield
        finally:
            with self._lock:
                self._users[records] -= 1

    @contextmanager
    def exclusive(self, records: Int[np.ndarray, "n"]) -> Iterator[None]:
        """No other thread holds any of the (distinct) records."""
        with self._lock:
            assert (self._users[records] == 0).all(), f"{self._what}: changed while being used"
            self._users[records] = -1
        try:
            yield
        finally:
            with self._lock:
                self._users[records] = 0
