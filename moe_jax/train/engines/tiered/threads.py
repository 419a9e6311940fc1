"""The threads that move experts in training, and when they were at work."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, NamedTuple, get_args

import jax

Task = Literal["bring", "read", "write"]
"""`bring` brings experts up to date and to a layer buffer. `read` and `write` work on the tiers
below, so that `bring` can compute meanwhile."""


class Span(NamedTuple):
    """The time of an activity, in seconds of perf_counter."""

    what: str
    """A task, or "compute" while its thread waited for the device, or "wait" while the update
    waited."""
    begin: float
    end: float


class Threads:
    """One thread for each kind of task, which does them in the order they were handed in.

    With `blocking`, `submit` waits for its task. This is the control that shows what asynchronous
    transfers gain.
    """

    def __init__(self) -> None:
        self.blocking = False
        self.spans: list[Span] = []
        self._pools = {task: ThreadPoolExecutor(1, task) for task in get_args(Task)}

    def submit(
        self, task: Task, call: Callable[..., Any], *arguments: Any, computed: Any = ()
    ) -> "Future[Any]":
        """Has the thread of `task` make the call, once the arrays `computed` are ready."""

        # The wait is timed apart: a thread that waits for the device is not at work.
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
            # From several threads: list.append is atomic.
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
