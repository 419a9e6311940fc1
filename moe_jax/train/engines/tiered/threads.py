"""The threads that move experts in training, and when they were at work."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, NamedTuple, get_args

import jax

Task = Literal["bring", "read", "write"]
"""bring: to a layer buffer, up to date. read and write: the tiers below, for the thread that
brings."""


class Span(NamedTuple):
    """When something was done, in seconds of perf_counter."""

    what: str
    """A task, or "compute" while its thread waited for the device, or "wait" while the update
    waited."""
    begin: float
    end: float


class Threads:
    """One thread for each kind of task, which does them in the order they were handed in.

    `blocking` waits for every task before anything else happens: the control of the asynchronous
    threads.
    """

    def __init__(self) -> None:
        self.blocking = False
        self.spans: list[Span] = []
        self._pools = {task: ThreadPoolExecutor(1, task) for task in get_args(Task)}

    def submit(
        self, task: Task, call: Callable[..., Any], *arguments: Any, computed: Any = ()
    ) -> "Future[Any]":
        """Has the thread of `task` make the call, once the arrays `computed` are ready."""

        def run() -> Any:
            if computed:
                with self.timed("compute"):
                    jax.block_until_ready(computed)
            with self.timed(task):
                return call(*arguments)

        future = self._pools[task].submit(run)
        if self.blocking:
            wait([future])
        return future

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds a span for what is done in the context."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(what, begin, perf_counter()))

    def take_spans(self) -> list[Span]:
        """Those since the last call."""
        spans = self.spans
        self.spans = []
        return spans

    def close(self) -> None:
        """Ends the threads. Tasks that have not begun are dropped."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
