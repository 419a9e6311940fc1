"""Corpora of documents, their split into training and validation, and samples of their text."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.base.errors import UserError

SAMPLE_BYTES = 8 << 20
"""Largest size of the text that a tokenizer is trained on."""
EXCERPT_BYTES = 4 << 10
"""Size of one excerpt in that text: short, so that excerpts come from many documents."""


class Document(NamedTuple):
    """A document, or a piece of one that is too long for memory.

    Consecutive ones with the same name are the pieces of one document, in order. `replaced`: this
    piece or an earlier one had bytes that are no valid UTF-8, which became U+FFFD.
    """

    name: str
    text: str
    replaced: bool = False


class Corpus(ABC):
    """Documents that are read one at a time, long ones piece by piece.

    `sizes`: int64[documents], bytes of each.
    """

    sizes: np.ndarray

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of document `index`, unique and the same on every machine. It decides the split."""

    @abstractmethod
    def read(self, index: int) -> Iterator[Document]:
        """The pieces of document `index`: at least one, even if the document is empty."""

    @abstractmethod
    def excerpt(self, index: int, start: int, size: int) -> str:
        """At most `size` bytes of document `index` from byte `start` on, as text."""

    @abstractmethod
    def fingerprint(self, cache: Path) -> str:
        """Hash of all names and contents. Content hashes may be remembered in `cache`."""


def digest(*parts: str) -> str:
    """Hash of a sequence of strings: 128 bits of blake2b, in hexadecimal."""
    return digest_all(parts)


def digest_all(parts: Iterable[str]) -> str:
    """`digest` of strings that need not be in memory together."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        # File names that are no UTF-8 reach Python with surrogates for their bytes.
        data = part.encode("utf-8", "surrogateescape")
        # With the lengths, ("ab", "c") and ("a", "bc") differ.
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def split(corpus: Corpus, validation_fraction: float) -> np.ndarray:
    """Which documents are held out: bool[documents].

    A document is held out if the hash of its name, as a number in [0, 1), is below the fraction.
    Adding documents therefore moves none of the others. The document with the lowest hash is always
    held out and the one with the highest never, so that neither side is empty. UserError: fewer
    than two documents have any text.
    """
    filled = np.flatnonzero(corpus.sizes > 0)
    if filled.size < 2:
        raise UserError(
            f"the corpus has {filled.size} non-empty document: validation text is split off by "
            "file, so at least two are needed (add one, or cut it into several: --data.source)"
        )
    names = map(corpus.name, range(len(corpus.sizes)))
    # 13 hexadecimal digits are 52 bits, which a float64 holds exactly.
    hashes = np.array([int(digest(name)[:13], 16) / 16**13 for name in names])
    held_out = hashes < validation_fraction
    held_out[filled[np.argmin(hashes[filled])]] = True
    held_out[filled[np.argmax(hashes[filled])]] = False
    return held_out


def sample(corpus: Corpus, documents: np.ndarray, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """At most `limit` bytes of text: all, or excerpts at even distances.

    `documents`: int[documents], their indices in the corpus.
    """
    ends = np.cumsum(corpus.sizes[documents])
    if ends[-1] <= limit:
        for index in documents:
            yield from (piece.text for piece in corpus.read(index))
        return
    count = max(1, limit // EXCERPT_BYTES)
    # Positions in all documents joined: a long document gives more excerpts than a short one.
    for position in (int(ends[-1]) * i // count for i in range(count)):
        at = int(np.searchsorted(ends, position, side="right"))
        index = int(documents[at])
        start = position - int(ends[at] - corpus.sizes[index])
        yield corpus.excerpt(index, start, min(limit, EXCERPT_BYTES))
