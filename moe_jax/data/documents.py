"""Corpora of documents, their split into training and validation, and samples of their text."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.base.hashes import digest, digest_all

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


class Opening(NamedTuple):
    """How a corpus is opened.

    `cache`: the folder that remembers content hashes. None: nothing is remembered. `binary`: files
    with NUL bytes are read as well. `say` is told in a line of what is left out.
    """

    cache: Path | None = None
    binary: bool = False
    say: Callable[[str], None] = print


class Corpus(ABC):
    """Documents that are read one at a time, long ones piece by piece.

    `sizes`: int64[documents], bytes of the text of each.
    """

    sizes: np.ndarray

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all names and texts."""

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
    def contents(self) -> np.ndarray:
        """Hash of the text of each document: uint64[documents]."""


def split(corpus: Corpus, validation_fraction: float) -> np.ndarray:
    """Which documents are held out: bool[documents].

    A document is held out if the hash of its name, as a number in [0, 1), is below the fraction.
    Adding documents therefore moves none of the others. A document with the text of an earlier one
    goes where the earlier one is, so that no text is on both sides. The document with the lowest
    hash is always held out and the one with the highest never, so that neither side is empty.
    UserError: fewer than two documents have text of their own.
    """
    first = _first_with_text(corpus)
    own = np.flatnonzero((corpus.sizes > 0) & (first == np.arange(len(first))))
    if own.size < 2:
        raise UserError(
            f"the corpus has {own.size} document with text of its own: validation text is split "
            "off by file, so at least two are needed (add one, or cut it into several: "
            "--data.source)"
        )
    return _by_name(_name_hashes(corpus), own, validation_fraction)[first]


def moved(corpus: Corpus, validation_fraction: float) -> str:
    """Hash of the documents that `split` puts elsewhere than their names alone would.

    It is empty if there are none.
    """
    alone = _by_name(_name_hashes(corpus), np.flatnonzero(corpus.sizes > 0), validation_fraction)
    indices = np.flatnonzero(alone != split(corpus, validation_fraction))
    return digest_all(map(corpus.name, indices.tolist())) if indices.size else ""


def _name_hashes(corpus: Corpus) -> np.ndarray:
    """The hash of each document's name as a number in [0, 1): float64[documents]."""
    names = map(corpus.name, range(len(corpus.sizes)))
    # 13 hexadecimal digits are 52 bits, which a float64 holds exactly.
    return np.array([int(digest(name)[:13], 16) / 16**13 for name in names])


def _by_name(hashes: np.ndarray, candidates: np.ndarray, fraction: float) -> np.ndarray:
    """Which hashes are below the fraction, with one candidate on either side: bool[documents]."""
    held_out = hashes < fraction
    held_out[candidates[np.argmin(hashes[candidates])]] = True
    held_out[candidates[np.argmax(hashes[candidates])]] = False
    return held_out


def _first_with_text(corpus: Corpus) -> np.ndarray:
    """For each document, the first that has its text: int[documents]. Empty ones count as own."""
    _, first, group = np.unique(corpus.contents(), return_index=True, return_inverse=True)
    # An empty document has no text that could be known in advance.
    return np.where(corpus.sizes > 0, first[group], np.arange(len(corpus.sizes)))


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
