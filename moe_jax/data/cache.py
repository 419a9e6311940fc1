"""The cache folder: entries that appear whole or not at all, and whose damage is noticed.

An entry is a folder of files. It is written under a temporary name and renamed, so that a killed
process leaves no half entry. meta.json holds a checksum of every file, and begins with its own.
"""

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError
from moe_jax.base.files import sync, write_atomically
from moe_jax.base.hashes import digest, hasher
from moe_jax.base.paths import user_path
from moe_jax.base.scratch import is_scratch, make_scratch, mark_scratch, remove_scratch

META = "meta.json"
TEMPORARY = "tmp-"
STALE_SECONDS = 24 * 3600
"""A temporary folder without a write for so long belongs to a process that is gone."""
CHECKED_BLOCK = 64 << 10
"""Bytes that are read at one place of a file for its checksum."""
CHECKED_BLOCKS = 4096
"""Places at which a file is read. Files up to 256 MiB are read whole, longer ones in part, so that
a start stays quick."""


def cache_folder(setting: str) -> Path:
    """The folder that --data.cache names. Unset, $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax."""
    if setting:
        return user_path(setting)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base) / "moe_jax"


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Makes the folder, and turns operating-system errors inside the block into a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot use the cache folder {folder}: {error.strerror or error} (make room for it, "
            "or name another with --data.cache)"
        ) from error


def entry(
    folder: Path, build: Callable[[Path], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    """The description of the entry `folder`, which is built first if it is missing or damaged.

    `build` writes files into the folder that it gets and returns a JSON-serialisable description.
    Another process may build the same entry at the same time. The first to finish wins.
    """
    description = _verified(folder)
    if description is not None:
        return description
    if os.path.lexists(folder):
        say(f"the cache entry {folder} is damaged: building it again")
        _discard(folder, say)
    _remove_stale(folder.parent)
    with _appearing(folder) as temporary:
        _write_meta(temporary, build(temporary))
    description = _verified(folder)
    if description is None:
        raise UserError(
            f"the cache entry {folder} does not read back as written: check the disk, or name "
            "another folder with --data.cache"
        )
    return description


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block ends without an error."""
    scratch = _new_scratch(folder.parent)
    temporary = scratch / folder.name
    temporary.mkdir()
    try:
        yield temporary
        # Before the rename: else a power failure could leave a renamed folder of empty files.
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        try:
            temporary.rename(folder)
        except OSError as error:
            # Another process finished first. It wrote the same, because an entry's name is a hash
            # of everything that the entry is made from.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        with contextlib.suppress(OSError):  # what stays is stale in a day
            remove_scratch(scratch)


def _new_scratch(cache: Path) -> Path:
    return make_scratch(cache / f"{TEMPORARY}{uuid.uuid4().hex}")


def _discard(folder: Path, say: Callable[[str], None]) -> None:
    """Removes a damaged entry. What has no mark of ours is renamed instead."""
    if not is_scratch(folder):
        aside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
        say(f"it is kept as {aside}, because nothing shows that moe_jax made it")
        _rename(folder, aside)
        return
    # Renamed before it is removed: another process never sees a half removed entry.
    scratch = _new_scratch(folder.parent)
    _rename(folder, scratch / folder.name)
    remove_scratch(scratch)


def _rename(folder: Path, target: Path) -> None:
    # It is missing if another process discards it at this moment.
    with contextlib.suppress(FileNotFoundError):
        folder.rename(target)


def _remove_stale(cache: Path) -> None:
    for folder in cache.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):  # another process removes it, too
            if is_scratch(folder) and time.time() - _last_write(folder) > STALE_SECONDS:
                remove_scratch(folder)


def _last_write(folder: Path) -> float:
    return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])


def _write_meta(folder: Path, description: dict[str, Any]) -> None:
    mark_scratch(folder)  # so that the entry may be removed if it is damaged
    files = {path.name: [path.stat().st_size, checksum(path)] for path in folder.iterdir()}
    (folder / META).write_text(_sealed({"description": description, "files": files}))


def _sealed(content: Any) -> str:
    """The content as JSON, below a line with the JSON's own checksum."""
    text = json.dumps(content)
    return f"{digest(text)}\n{text}"


def _unsealed(path: Path) -> Any:
    """The content of a file that `_sealed` gave. ValueError: it is damaged."""
    text_digest, _, text = path.read_text().partition("\n")
    if text_digest != digest(text):
        raise ValueError("the checksum does not hold")
    return json.loads(text)


def _verified(folder: Path) -> dict[str, Any] | None:
    """The description of an entry, or None if the entry is missing or damaged."""
    try:
        meta = _unsealed(folder / META)
        for name, (size, expected) in meta["files"].items():
            path = folder / name
            if path.stat().st_size != size or checksum(path) != expected:
                return None
    # The middle two: a damaged disk may show a file where a folder was, or the reverse.
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return meta["description"]


def checksum(path: Path) -> str:
    """blake2b of a file, or of evenly spaced blocks of it if it is long.

    The size is compared separately (_verified), so that a cut file is always noticed.
    """
    state = hasher()
    count = -(-path.stat().st_size // CHECKED_BLOCK)
    step = max(1.0, count / CHECKED_BLOCKS)  # in blocks, and no whole number for a long file
    with path.open("rb") as file:
        for i in range(min(count, CHECKED_BLOCKS)):
            file.seek(int(i * step) * CHECKED_BLOCK)
            state.update(file.read(CHECKED_BLOCK))
    return state.hexdigest()


class HashIndex:
    """Remembers what reading a text told, such as its hash: a start need not read it all again.

    It trusts a file's state as git's index does: if size, times and inode are those recorded with
    the hash, the content is unchanged. `corpus` names the corpus whose hashes these are. The file
    begins with its own checksum. `say` tells of an index that cannot be used, which is made anew.
    """

    def __init__(self, cache: Path, corpus: str, say: Callable[[str], None] = print):
        self._path = cache / f"hashes-{digest(corpus)}.json"
        self._used: dict[str, list[Any]] = {}
        self._known: dict[str, list[Any]] = {}
        try:
            self._known = _unsealed(self._path)
        except FileNotFoundError:
            pass
        except ValueError:
            say(f"{self._path} is damaged or of another version: reading the text again")

    def recall(self, name: str, state: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """The value remembered for `name` if its `state` is the same, or else `compute()`.

        Values are what JSON can express, with lists for sequences.
        """
        known = self._known.get(name)
        if not known or known[:-1] != list(state):
            known = [*state, compute()]
        self._used[name] = known
        return known[-1]

    def save(self) -> None:
        """Writes the index if it has changed.

        Errors are ignored: without the index the next start is slower, not wrong.
        """
        if self._used == self._known:
            return
        with contextlib.suppress(OSError):
            write_atomically(self._path, _sealed(self._used))
