"""The files of one split: NAME.tokens and NAME.starts, flat arrays without a header."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moe_jax.data.documents import Document
from moe_jax.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4 << 20
"""Text encoded at once: enough for all threads, and some 400 MB of the encoder's memory."""


def write_split(
    folder: Path,
    name: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Encodes documents into the files of the split `name`.

    Returns the counts {"documents", "bytes", "tokens", "replaced"}. `advance` is called with the
    number of bytes done since its last call.
    """
    with (folder / f"{name}.tokens").open("wb") as file:
        writer = _Writer(file, tokenizer)
        for batch in _batches(documents):
            before = writer.bytes
            texts = [document.text for document in batch]
            for document, ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                writer.add(document, ids)
            advance(writer.bytes - before)
        writer.end()
    (folder / f"{name}.starts").write_bytes(writer.starts.tobytes())
    return writer.counts()


def open_split(folder: Path, name: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The memory-mapped arrays (tokens, starts) that `write_split` wrote."""
    tokens = np.memmap(folder / f"{name}.tokens", _token_dtype(tokenizer), "r")
    starts = np.memmap(folder / f"{name}.starts", np.int64, "r")
    # As plain arrays over the same mapping: slicing a memmap costs ten times as much (1 µs).
    return np.asarray(tokens), np.asarray(starts)


def _token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents (or pieces of them) until each group has enough text to encode at once."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


class _Writer:
    """Writes documents as [bos, tokens…, eos]. The pieces of one come one after another."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        # An array of int64, which takes a fifth of a list's memory where documents are many.
        self.starts = array("q")
        self.bytes = 0
        self._tokens = 0
        self._file = file
        self._tokenizer = tokenizer
        self._dtype = _token_dtype(tokenizer)
        self._document: str | None = None
        self._replaced = 0
        self._last_replaced: str | None = None

    def add(self, document: Document, ids: np.ndarray) -> None:
        """Writes the ids of a document or of its next piece."""
        if document.name != self._document:
            self.end()
            self._document = document.name
            self.starts.append(self._tokens)
            self._put(np.array([self._tokenizer.bos]))
        # The pieces of a document come in a row, so no set of all names is needed.
        if document.replaced and document.name != self._last_replaced:
            self._last_replaced = document.name
            self._replaced += 1
        self._put(ids)

    def end(self) -> None:
        """Closes the document that is open, if one is."""
        if self._document is not None:
            self._put(np.array([self._tokenizer.eos]))

    def counts(self) -> dict[str, int]:
        """Documents, bytes of text, tokens, and documents with replaced bytes so far."""
        return {
            "documents": len(self.starts),
            "bytes": self.bytes,
            "tokens": self._tokens,
            "replaced": self._replaced,
        }

    def _put(self, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self._tokens += len(ids)
        self.bytes += int(self._tokenizer.byte_lengths[ids].sum())
