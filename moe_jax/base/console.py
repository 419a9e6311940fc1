"""What the terminal shows: lines, and a progress bar for long work on files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Prints one line, from the first process only."""
    if jax.process_index() == 0:
        console.print(line, markup=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done; the block calls what it is given with a count."""
    console = Console(stderr=True)  # stdout may be piped into a file
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
