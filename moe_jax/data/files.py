"""Corpora of files, read in pieces, so that a file may be larger than memory."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from moe_jax.base.console import progress
from moe_jax.base.errors import UserError
from moe_jax.base.hashes import digest
from moe_jax.data.cache import HashIndex
from moe_jax.data.contents import Content, content_of, readable
from moe_jax.data.documents import Corpus, Document, Opening
from moe_jax.data.encodings import blocks_of, pieces, skip_mark, text_at
from moe_jax.data.left_out import LeftOut
from moe_jax.data.paths import Matches, root_and_parts


class FileCorpus(Corpus):
    """Files below the folder `root`, sorted by name, one document each.

    UserError: a file cannot be read. The message names it.
    """

    def __init__(self, root: Path, files: dict[str, Content]):
        """`files`: name from `root` -> content."""
        self.root = root
        self.names = sorted(files)
        contents = [files[name] for name in self.names]
        self.sizes = np.array([content.size for content in contents], np.int64)
        self._hashes = [content.hash for content in contents]

    @property
    def fingerprint(self) -> str:
        return digest(*self.names, *self._hashes)

    def name(self, index: int) -> str:
        return self.names[index]

    def contents(self) -> np.ndarray:
        # 64 of the 128 bits: enough that no two of a billion texts are likely to be taken for one.
        return np.array([int(content[:16], 16) for content in self._hashes], np.uint64)

    def read(self, index: int) -> Iterator[Document]:
        name = self.names[index]
        with readable(self.root / name) as path, path.open("rb") as file:
            encoding = skip_mark(file)
            for text, replaced in pieces(blocks_of(file), encoding):
                yield Document(name, text, replaced)

    def excerpt(self, index: int, start: int, size: int) -> str:
        with readable(self.root / self.names[index]) as path, path.open("rb") as file:
            return text_at(file, int(self.sizes[index]), start, size)


def stdlib_corpus(how: Opening) -> FileCorpus:
    """Python's own standard library: every .py file, installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    names = []
    for folder, folders, files in os.walk(root):
        # Changed in place: os.walk then does not enter the others.
        folders[:] = [name for name in folders if name not in skipped]
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return _open(f"stdlib ({root})", root, names, LeftOut(), how)


def glob_corpus(pattern: str, how: Opening) -> FileCorpus:
    """The regular files that match a glob (`**` recurses, `~` expands), or all below a folder.

    Names are relative to the longest part of the path that has no wildcard.
    """
    folder, parts = root_and_parts(pattern)
    matches = Matches(folder, parts)
    with readable(Path(folder)):
        names = list(matches)
    left_out = LeftOut()
    left_out.add("links to folders that are read anyway", matches.links)
    left_out.add("links that lead nowhere", matches.broken)
    left_out.add("folders that may not be read", matches.unreadable)
    return _open(f"files:{pattern}", Path(folder), names, left_out, how)


def _open(
    source: str, root: Path, names: Iterable[str], left_out: LeftOut, how: Opening
) -> FileCorpus:
    """The corpus of these files: each real file once, and those with NULs only if asked for."""
    statuses = _one_name_each(root, names, left_out)
    if not statuses:
        left_out.tell(how.say)
        raise UserError(f"data.source '{source}' matches no file: check the path")
    files = _contents(root, statuses, how)
    if not how.binary:
        binary = [name for name, content in files.items() if content.binary]
        left_out.add("files with NUL bytes, as data.binary is False", binary)
        for name in binary:
            del files[name]
    left_out.tell(how.say)
    if not any(content.size for content in files.values()):
        what = "are empty" if files else "have NUL bytes, which text has not"
        raise UserError(
            f"data.source '{source}' matches {len(statuses)} files and all {what}: name files that "
            "hold text"
        )
    return FileCorpus(root, files)


def _contents(root: Path, statuses: dict[str, os.stat_result], how: Opening) -> dict[str, Content]:
    """The content of each file. Those that have changed since the last time are read."""
    index = None if how.cache is None else HashIndex(how.cache, str(root), how.say)
    files = {}
    with progress("reading", sum(status.st_size for status in statuses.values())) as advance:
        for name, status in statuses.items():
            files[name] = content_of(root, name, status, index)
            advance(status.st_size)
    if index is not None:
        index.save()
    return files


def _one_name_each(
    root: Path, names: Iterable[str], left_out: LeftOut
) -> dict[str, os.stat_result]:
    """The state of each real file, by one of its names: by its own if that is among them."""
    statuses = {name: _status(root / name) for name in sorted(set(names))}
    first: dict[tuple[int, ...], str] = {}
    several: dict[str, list[str]] = {}
    for name, status in statuses.items():
        # Some file systems over a network give several files one inode. Size and time differ.
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if first.setdefault(key, name) != name:
            several.setdefault(first[key], [first[key]]).append(name)
    real_root = os.path.realpath(root)
    for same in several.values():
        own = min(same, key=lambda name: (_is_alias(real_root, name), name))
        others = [name for name in same if name != own]
        left_out.add("further names of files", others)
        for name in others:
            del statuses[name]
    return statuses


def _is_alias(real_root: str, name: str) -> bool:
    """Whether a link is on the way from the folder to the file."""
    path = os.path.join(real_root, name)
    return os.path.realpath(path) != os.path.normpath(path)


def _status(path: Path) -> os.stat_result:
    with readable(path):
        return path.stat()
