"""Compression baselines: bits per byte of gzip, xz and a byte n-gram model on held-out text.

A language model that predicts the same text in fewer bits per byte beats them. All take the
held-out documents joined, as TokenArray.text() returns them.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError

TRAINING_BYTES = 32_000_000
"""Largest number of bytes of training text that the n-gram model counts: the first ones."""
PIECE = 4_000_000
"""Bytes that are counted at a time, which bounds the memory that sorting takes."""
COMPRESSED = 100_000
"""Bytes that are compressed at a time. The result does not depend on it."""
LARGEST_ORDER = 7
"""Bytes of an n-gram that fit into one int64 without its sign bit."""
GZIP = 31
"""zlib's window of 15 bits, in gzip's format."""

OnBytes = Callable[[int], None]
"""Is called with the number of bytes that were read since the last call."""


def unwatched(count: int) -> None:
    """An OnBytes that does nothing."""


def gzip_bits_per_byte(data: bytes, on_bytes: OnBytes = unwatched) -> float:
    """Bits per byte of `gzip -9`. UserError: there are no bytes."""
    return _bits_per_byte(zlib.compressobj(9, zlib.DEFLATED, GZIP), data, on_bytes)


def xz_bits_per_byte(data: bytes, on_bytes: OnBytes = unwatched) -> float:
    """Bits per byte of `xz -9`. UserError: there are no bytes."""
    return _bits_per_byte(lzma.LZMACompressor(preset=9), data, on_bytes)


def _bits_per_byte(compressor: Any, data: bytes, on_bytes: OnBytes) -> float:
    _not_empty("held-out", data)
    size = 0
    for begin in range(0, len(data), COMPRESSED):
        piece = data[begin : begin + COMPRESSED]
        size += len(compressor.compress(piece))
        on_bytes(len(piece))
    return 8 * (size + len(compressor.flush())) / len(data)


def ngram_bits_per_byte(
    train_chunks: Iterable[bytes],
    held_out: bytes,
    order: int = 5,
    on_bytes: OnBytes = unwatched,
) -> float:
    """Cross-entropy, in bits per byte, of an n-gram model of `train_chunks` on `held_out`.

    UserError: either is empty, or `order` is not between 1 and 7.
    """
    training = _first(train_chunks, TRAINING_BYTES)
    probabilities = ngram_probabilities(training, held_out, order, on_bytes)
    return float(-np.log2(probabilities).mean())


def ngram_probabilities(
    training: bytes, held_out: bytes, order: int, on_bytes: OnBytes = unwatched
) -> np.ndarray:
    """Probability that the model gives to each byte of `held_out`: float64[bytes].

    It is the Witten-Bell interpolation of orders 1 to `order`, starting from p = 1/256 (Chen &
    Goodman 1998, §2.5). N(h c) is the count of byte c after history h, N(h) the count of h, T(h)
    the number of different bytes after h, and h' the history without its oldest byte:

        p(c | h) = (N(h c) + T(h) p(c | h')) / (N(h) + T(h)),  and p(c | h') if h is new.

    Both texts are preceded by order - 1 zero bytes.
    """
    if not 1 <= order <= LARGEST_ORDER:
        raise UserError(f"order is {order}: an n-gram has 1 to {LARGEST_ORDER} bytes")
    _not_empty("training", training)
    _not_empty("held-out", held_out)
    queries = _grams(held_out, order)
    probabilities = np.full(len(queries), 1 / 256)
    for n, (grams, counts) in enumerate(_count(training, order, on_bytes), start=1):
        probabilities = _interpolate(grams, counts, queries & _mask(n), probabilities)
    return probabilities


def _not_empty(what: str, data: bytes) -> None:
    if not data:
        raise UserError(f"there are no {what} bytes: add text (--data.source)")


def _first(chunks: Iterable[bytes], limit: int) -> bytes:
    """The first `limit` bytes of the chunks. Later chunks are not read."""
    text = bytearray()
    for chunk in chunks:
        text += chunk[: limit - len(text)]
        if len(text) == limit:
            break
    return bytes(text)


def _mask(n: int) -> int:
    """Selects the last n bytes of a packed n-gram."""
    return (1 << 8 * n) - 1


def _grams(data: bytes, order: int) -> np.ndarray:
    """Each byte with the order - 1 bytes before it, packed: int64[bytes].

    The oldest byte is in the highest bits, so that sorting brings equal histories together.
    """
    grams = np.zeros(len(data), np.int64)
    padded = np.frombuffer(bytes(order - 1) + data, np.uint8)
    for i in range(order):
        grams <<= 8
        grams |= padded[i : i + len(data)]
    return grams


def _count(training: bytes, order: int, on_bytes: OnBytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """For n = 1 … order: the n-grams that occur, sorted, and how often each does."""
    pieces = []
    for begin in range(0, len(training), PIECE):
        pieces.append(_count_piece(training, begin, order))
        on_bytes(min(PIECE, len(training) - begin))
    levels = [_regroup(*map(np.concatenate, zip(*pieces, strict=True)))]
    # A shorter n-gram occurs as often as all those that end in it: the text is sorted only once.
    for n in range(order - 1, 0, -1):
        longer, counts = levels[0]
        levels.insert(0, _regroup(longer & _mask(n), counts))
    return levels


def _count_piece(training: bytes, begin: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams that end in one piece of the text, sorted, and how often each does there."""
    # The piece is read with the bytes before it, whose own n-grams are then cut off.
    context = max(0, begin - order + 1)
    grams = _grams(training[context : begin + PIECE], order)[begin - context :]
    return np.unique(grams, return_counts=True)


def _regroup(grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct n-grams, sorted, with the sum of the counts of each."""
    by_gram = np.argsort(grams)
    ordered = grams[by_gram]
    starts = _starts(ordered)
    return ordered[starts], np.add.reduceat(counts[by_gram], starts)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))


def _interpolate(
    grams: np.ndarray, counts: np.ndarray, queries: np.ndarray, lower: np.ndarray
) -> np.ndarray:
    """p(c | h) for each n-gram h c in `queries`, from `lower` = p(c | h')."""
    # Shifting out the last byte leaves the history. Sorted n-grams have equal histories in a row.
    starts = _starts(grams >> 8)
    histories = (grams >> 8)[starts]
    history_counts = np.add.reduceat(counts, starts)
    history_types = np.diff(starts, append=len(grams))
    n_hc = _find(grams, counts, queries)
    n_h = _find(histories, history_counts, queries >> 8)
    t_h = _find(histories, history_types, queries >> 8)
    # The maximum avoids 0 / 0 for new histories, where `lower` is taken.
    return np.where(n_h > 0, (n_hc + t_h * lower) / np.maximum(n_h + t_h, 1), lower)


def _find(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[i] for a query that equals keys[i], and 0 for one that equals no key."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)
