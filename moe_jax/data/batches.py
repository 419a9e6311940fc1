"""Packed batches: fixed windows over the token array, shuffled, sharded and resumable (grain)."""

import hashlib
from typing import Any, Protocol

import grain
import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.data.tokens import TokenArray

# Reading a window is a copy from mapped memory: one thread stays ahead of any training step.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class Windows:
    """Random access to a token array as overlapping windows of length + 1 + ahead tokens.

    Window i starts at token i·length, so that every token but the first is the next-token target
    of exactly one window. Each is {"tokens": int32[window], "segments": int32[window]}; segments
    number the documents in the window from 1, and 0 is padding beyond the array's end.
    """

    def __init__(self, array: TokenArray, length: int, ahead: int, count: int):
        self._tokens, self._starts = array.tokens, array.starts
        self._length, self._size, self._count = length, length + 1 + ahead, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = index * self._length
        found = self._tokens[begin : begin + self._size]
        documents = np.searchsorted(self._starts, np.arange(begin, begin + len(found)), "right")
        tokens, segments = np.zeros((2, self._size), np.int32)
        tokens[: len(found)] = found
        segments[: len(found)] = documents - documents[:1] + 1
        return {"tokens": tokens, "segments": segments}


class Beside(Protocol):
    """More arrays for each window, by the same numbers (distill.cache.TeacherCache)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]: ...


class Joined:
    """Windows with what lies beside them."""

    def __init__(self, windows: Windows, beside: Beside):
        self._windows, self._beside = windows, beside

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._windows[index] | self._beside[index]


def train_batches(
    array: TokenArray,
    length: int,
    batch: int,
    seed: int,
    ahead: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    beside: Beside | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches, in a new order in every epoch.

    Each is {"tokens", "segments"}: int32[B / process_count, L + 1 + ahead], this process's rows of
    the global batch, which is the same for any process_count; and the arrays `beside` each window.
    The iterator's `get_state()` is small and JSON-serialisable; after `set_state` the batches go on
    bit for bit. Raises UserError if the array is shorter than one window or the processes do not
    divide the batch.
    """
    size = length + 1 + ahead
    if len(array.tokens) < size:
        raise UserError(
            f"the training text has {len(array.tokens)} tokens, fewer than the {size} of one "
            f"sequence (data.length={length}, {ahead} further predicted): shorten --data.length or "
            "add text"
        )
    windows: Any = Windows(array, length, ahead, (len(array.tokens) - size) // length + 1)
    if beside is not None:
        assert len(beside) >= len(windows), "what lies beside the windows is of another length"
        windows = Joined(windows, beside)
    order = grain.MapDataset.source(windows).shuffle(_grain_seed(seed)).repeat()
    return _rows(order, batch, process_index, process_count)


def validation_batches(
    array: TokenArray,
    length: int,
    batch: int,
    ahead: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Every window once, in order; the last batch is filled up with windows of padding.

    Shapes and errors as for `train_batches`; a short array is padded.
    """
    count = -(-(len(array.tokens) - 1) // length)
    windows = Windows(array, length, ahead, -(-count // batch) * batch)
    return _rows(grain.MapDataset.source(windows), batch, process_index, process_count)


def shifted_targets(tokens: Any, segments: Any, length: int, offset: int = 1) -> tuple[Any, Any]:
    """What position t has to predict: token t + offset, if it belongs to the same document.

    `tokens`, `segments`: [B, at least length + offset], NumPy or JAX. Returns targets [B, length]
    and mask bool[B, length], false where t + offset is in another document or padding.
    """
    here, there = segments[:, :length], segments[:, offset : offset + length]
    return tokens[:, offset : offset + length], (here == there) & (here != 0)


def _rows(
    windows: grain.MapDataset, batch: int, process_index: int, process_count: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches of this process's rows: process p has the p-th run of rows in each global batch."""
    if batch % process_count:
        raise UserError(
            f"batch={batch} is not divisible by the {process_count} processes: each reads the same "
            "number of sequences"
        )
    local = windows.batch(batch // process_count)
    return iter(local[process_index::process_count].to_iter_dataset(READ))


def _grain_seed(seed: int) -> int:
    # grain shuffles epoch e with seed + e: neighbouring seeds would share their epochs' orders.
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
