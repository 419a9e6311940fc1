"""This process among those of its run: its name in messages, and how it ends."""

import os
import sys
from typing import NoReturn


class _This:
    """Set once, by `join`. A process that trains alone has no name."""

    index: int | None = None


def join(index: int) -> None:
    """From now on this is process `index` of several."""
    _This.index = index


def index() -> int:
    """The number of this process. It does not start JAX's devices, as jax.process_index does."""
    return _This.index or 0


def in_group() -> bool:
    """Whether this process has others beside it."""
    return _This.index is not None


def named(line: str) -> str:
    """The line, which begins with the name of the process unless it trains alone."""
    return line if _This.index is None else f"process {_This.index}: {line}"


def leave(code: int) -> NoReturn:
    """Ends the program with this exit code.

    One of several processes ends at once: JAX's farewell, and threads that write a checkpoint
    together, would wait for processes that may have ended before.
    """
    if _This.index is None:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # _exit drops what Python has buffered
    os._exit(code)
