"""Output to the terminal: lines, and a progress bar for long work on files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

# Without soft_wrap rich would cut long lines at 80 columns when stdout is a file.
console = Console(highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Prints one line, from the first process only."""
    if jax.process_index() == 0:
        console.print(line, markup=False)  # brackets in paths are no markup


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done.

    The block gets a function and calls it with the number of bytes done since the last call.
    Nothing is shown where stderr is no terminal.
    """
    stderr = Console(stderr=True)  # stdout may be piped into a file
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    ]
    hidden = not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
