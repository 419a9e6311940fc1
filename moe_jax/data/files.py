"""Corpora of files, read in pieces, so that a file may be larger than memory."""

import codecs
import glob
import hashlib
import os
import sysconfig
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moe_jax.base.console import progress
from moe_jax.base.errors import UserError
from moe_jax.data.cache import HashIndex
from moe_jax.data.documents import Corpus, Document, digest

PIECE_BYTES = 1 << 20
"""Size of the pieces in which a file is read. Several fill one batch of the tokenizer."""
SETTLED_SECONDS = 2
"""Age from which a file's time stamps are trusted. A younger file may change again within one tick
of its file system's clock, which leaves the time stamps as they are."""


class FileCorpus(Corpus):
    """The files `names`, relative to the folder `root`, sorted, one document each.

    UserError: a file cannot be read. The message names it.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        self.root = root
        self.names = sorted(set(names))
        self._stats = [_stat(root / name) for name in self.names]
        self.sizes = np.array([stat.st_size for stat in self._stats], np.int64)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> Iterator[Document]:
        name = self.names[index]
        with readable(self.root / name) as path, path.open("rb") as file:
            for text, replaced in pieces(iter(lambda: file.read(PIECE_BYTES), b"")):
                yield Document(name, text, replaced)

    def excerpt(self, index: int, start: int, size: int) -> str:
        with readable(self.root / self.names[index]) as path, path.open("rb") as file:
            file.seek(start)
            # "ignore" drops characters that the excerpt's ends cut in two.
            return file.read(size).decode("utf-8", "ignore")

    def fingerprint(self, cache: Path) -> str:
        index = HashIndex(cache, str(self.root))
        hashes = []
        with progress("reading", int(self.sizes.sum())) as advance:
            for name, stat in zip(self.names, self._stats, strict=True):
                hashes.append(_hash(index, self.root, name, stat))
                advance(stat.st_size)
        index.save()
        return digest(*self.names, *hashes)


def _stat(path: Path) -> os.stat_result:
    with readable(path):
        return path.stat()


def _hash(index: HashIndex, root: Path, name: str, stat: os.stat_result) -> str:
    if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_SECONDS:
        return content_hash(root / name)
    # ctime, because a program may set mtime back. The inode changes if another file takes the name.
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return index.hash(name, state, lambda: content_hash(root / name))


def content_hash(path: Path) -> str:
    """blake2b of a file's bytes, in hexadecimal."""
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Turns an operating-system error inside the block into a UserError that names the file."""
    try:
        yield path
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror} (make it readable, or leave it out of "
            "data.source)"
        ) from error


def stdlib_corpus() -> FileCorpus:
    """Python's own standard library: every .py file, installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    names = []
    for folder, folders, files in os.walk(root):
        # Changed in place: os.walk then does not enter the others.
        folders[:] = [name for name in folders if name not in skipped]
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return _checked(FileCorpus(root, names), f"stdlib ({root})")


def glob_corpus(pattern: str) -> FileCorpus:
    """The regular files that match a glob (`**` recurses, `~` expands).

    Names are relative to the longest part of the path that has no wildcard.
    """
    here = glob.escape(os.getcwd())  # the folder's own name may have wildcards, such as [1]
    absolute = os.path.normpath(os.path.join(here, os.path.expanduser(pattern)))
    root = Path(absolute).parent
    while glob.has_magic(str(root)):
        root = root.parent
    paths = map(Path, glob.iglob(absolute, recursive=True))
    names = [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return _checked(FileCorpus(root, names), f"files:{pattern}")


def _checked(corpus: FileCorpus, source: str) -> FileCorpus:
    if not corpus.names:
        raise UserError(f"data.source '{source}' matches no file: check the path")
    if not corpus.sizes.any():
        raise UserError(
            f"data.source '{source}' matches {len(corpus.names)} files and all are empty: "
            "name files that hold text"
        )
    return corpus


def pieces(blocks: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    """Decodes blocks of UTF-8 into pieces (text, replaced).

    A block may end anywhere, also inside a character. Joined, the texts are what decoding
    everything at once with errors="replace" gives. `replaced`: a byte was replaced in this piece or
    an earlier one. Pieces end where lines do, if there are lines. At least one piece comes out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""  # decoded text that is not yet in a piece
    count = 0
    for block in blocks:
        cut = _line_end(rest)
        if cut:
            yield rest[:cut], decoder.errors == "replace"
            rest = rest[cut:]
            count += 1
        rest += _decode(decoder, block)
    rest += _decode(decoder, b"", final=True)
    if rest or count == 0:
        yield rest, decoder.errors == "replace"


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> str:
    """Decodes strictly until that fails, and from then on with replacement."""
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError:
        # A decoder that has raised keeps the bytes that were pending before this block, so the
        # block can be decoded again. The decoder's mode also records that it was needed.
        decoder.errors = "replace"
        return decoder.decode(block, final)


def _line_end(text: str) -> int:
    """Where to cut: before the last newlines, or else the last space, or else at the end.

    No token contains both a newline and the text before it (tokenizer.PATTERN), so a cut before
    newlines does not change the tokens.
    """
    end = len(text[: text.rfind("\n") + 1].rstrip("\r\n"))
    return end or max(text.rfind(" "), 0) or len(text)
