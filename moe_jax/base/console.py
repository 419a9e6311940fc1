"""Output to the terminal: lines, and progress, as a bar or as a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.base import process

Item = TypeVar("Item")

PLAIN_SECONDS = 15.0
"""Time between two lines of progress where there is no terminal."""

# Without soft_wrap rich would cut long lines at 80 columns when stdout is a file.
console = Console(highlight=False, soft_wrap=True)


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
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done.

    The block gets a function and calls it with the number of bytes done since the last call. Where
    stderr is no terminal, a line of it is printed every PLAIN_SECONDS instead of a bar. Only the
    first process shows anything.
    """
    if process.index() != 0:
        yield lambda count: None
        return
    stderr = Console(stderr=True)  # stdout may be piped into a file
    if not stderr.is_terminal:
        yield _plain_progress(description, total)
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


def _plain_progress(description: str, total: int) -> Callable[[int], None]:
    throttle = Throttle()
    began = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if throttle.ready():
            left = (time.monotonic() - began) * (total - done) / max(done, 1)
            line = f"{description}: {done / 1e6:.1f} of {total / 1e6:.1f} MB"
            print(f"{line}, {duration(max(left, 0))} left", file=sys.stderr, flush=True)

    return advance
