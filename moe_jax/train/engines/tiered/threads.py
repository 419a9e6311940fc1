"""The threads that move experts in training, and when they were at work."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, NamedTuple, get_args

import jax

Task = Literal["bring", "read", "write"]
"""bring: to a slab, up to date; read and write: the tiers below, for those who bring."""


class Span(NamedTuple):
    """Seconds of perf_counter for a task; in which its thread waited for what is to be written
    (compute); or in which the update waited (wait)."""

    what: str
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
        """Has the thread of `task` make the call, once the arrays `computed` are there."""

        def run() -> Any:
            if computed:
                with self.noted("compute"):
                    jax.block_until_ready(computed)
            with self.noted(task):
                return call(*arguments)

        future = self._pools[task].submit(run)
        if self.blocking:
            wait([future])
        return future

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Adds a span for what is done in the context."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(what, begin, perf_counter()))

    def take_spans(self) -> list[Span]:
        """Those since the last call."""
        spans, self.spans = self.spans, []
        return spans

    def close(self) -> None:
        """Ends the threads; what has not begun is dropped."""
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
