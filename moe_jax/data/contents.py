"""What one reading of a file tells, remembered until the file changes."""

import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moe_jax.base import paths
from moe_jax.base.hashes import hasher
from moe_jax.data.cache import HashIndex
from moe_jax.data.encodings import utf8_blocks

SETTLED_SECONDS = 2
"""Age from which a file's time stamps are trusted. A younger file may change again within one tick
of its file system's clock, which leaves the time stamps as they are."""

readable = partial(paths.readable, remedy="make it readable, or leave it out of data.source")
"""A block that reads a file of the corpus. An error names the file."""


class Content(NamedTuple):
    """What a file holds.

    `hash`: blake2b of the text as UTF-8, in hexadecimal. `size`: bytes of that text. `binary`: the
    text has a NUL.
    """

    hash: str
    size: int
    binary: bool


def content_of(root: Path, name: str, status: os.stat_result, index: HashIndex | None) -> Content:
    """The content of the file `name` below `root`, from the index if the file is as it was then."""
    path = root / name
    if index is None or time.time() - max(status.st_mtime, status.st_ctime) < SETTLED_SECONDS:
        return read_content(path)
    # ctime, because a program may set mtime back. The inode changes if another file takes the name.
    state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return Content(*index.recall(name, state, lambda: [*read_content(path)]))


def read_content(path: Path) -> Content:
    """Reads a whole file. UserError: it cannot be read."""
    state = hasher()
    size = 0
    binary = False
    with readable(path), path.open("rb") as file:
        for block in utf8_blocks(file):
            state.update(block)
            size += len(block)
            binary = binary or b"\0" in block
    return Content(state.hexdigest(), size, binary)
