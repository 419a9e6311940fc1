"""Output to the terminal: lines, and progress, as a bar or as a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_jax.base import process

Item = TypeVar("Item")

PLAIN_SECONDS = 15.0
"""Time between two lines of progress where there is no terminal."""


def open_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    # A notebook is no terminal: it gets plain lines. rich would make an HTML box of each, and
    # Jupyter's FORCE_COLOR lets it think that bars can be erased.
    terminal = False if "ipykernel" in sys.modules else None
    # Without soft_wrap rich would cut long lines at 80 columns when stdout is a file.
    return Console(
        stderr=stderr,
        highlight=False,
        soft_wrap=True,
        force_jupyter=False,
        force_terminal=terminal,
    )


console = open_console()


def say(line: str) -> None:
    """Prints one line, from the first process only."""
    if process.index() == 0:
        console.print(line, markup=False)  # brackets in paths are no markup


@cache
def say_once(line: str) -> None:
    """Prints a line the first time that it is to be said in this process."""
    say(line)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))


class Throttle:
    """Lets something happen at most every `seconds`. The first time is `seconds` from now."""

    def __init__(self, seconds: float = PLAIN_SECONDS) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Counts the time from now."""
        self._last = time.monotonic()

    def ready(self) -> bool:
        """Whether the time is over. Then it starts again."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self.restart()
        return True


def paced(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, with a line of progress every PLAIN_SECONDS.

    A line and no bar, so that it can stand above a bar that is shown already.
    """
    throttle = Throttle()
    began = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if throttle.ready():
            left = (time.monotonic() - began) * (total - done) / done
            say(f"{description}: {done} of {total}, {duration(max(left, 0))} left")


@contextmanager
def progress(
    description: str, total: int, unit: Literal["bytes", "items"] = "bytes"
) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes or items are done.

    The block gets a function and calls it with the number of those done since the last call. Where
    stderr is no terminal, a line of it is printed every PLAIN_SECONDS instead of a bar. Only the
    first process shows anything.
    """
    if process.index() != 0:
        yield lambda count: None
        return
    stderr = open_console(stderr=True)  # stdout may be piped into a file
    if not stderr.is_terminal:
        yield _plain_progress(description, total, unit)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _plain_progress(
    description: str, total: int, unit: Literal["bytes", "items"]
) -> Callable[[int], None]:
    throttle = Throttle()
    began = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if throttle.ready():
            left = (time.monotonic() - began) * (total - done) / max(done, 1)
            amount = f"{done} of {total}"
            if unit == "bytes":
                amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
            _tell(f"{description}: {amount}, {duration(max(left, 0))} left")

    return advance


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with `progress` of their number. `total`: where they have no length."""
    if total is None:
        assert isinstance(items, Sized), "give the total of items without a length"
        total = len(items)
    with progress(description, total, "items") as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Shows that the block is at work, and for how long, where nothing tells how much is left.

    Where stderr is no terminal, a line is printed every PLAIN_SECONDS. Only the first process shows
    anything.
    """
    if process.index() != 0:
        yield
        return
    stderr = open_console(stderr=True)  # stdout may be piped into a file
    if stderr.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        # Twice a second: what is at work may be timed.
        with Progress(*columns, console=stderr, transient=True, refresh_per_second=2) as bar:
            bar.add_task(description, total=None)
            yield
        return
    ended = threading.Event()
    # A thread, because the block is one call of a library.
    thread = threading.Thread(target=_tell_time, args=(description, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell_time(description: str, ended: threading.Event) -> None:
    began = time.monotonic()
    while not ended.wait(PLAIN_SECONDS):
        _tell(f"{description}: {duration(time.monotonic() - began)} so far")


@contextmanager
def downloading(description: str, without_bars: Callable[[], object]) -> Iterator[None]:
    """A block in which a library downloads, with bars of its own in a terminal.

    Elsewhere they would fill a log, so `without_bars` turns them off, and `working` tells the time.
    """
    if open_console(stderr=True).is_terminal:
        yield
        return
    without_bars()
    with working(description):
        yield
