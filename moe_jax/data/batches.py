"""Batches of packed documents: fixed windows over the token array, shuffled, sharded, resumable.

Documents are packed: a window may hold several of them, or a part of one. Segment numbers tell them
apart, so that attention and targets stay within a document.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.base.seeds import check_seed
from moe_jax.data.tokens import TokenArray

# Reading a window is a copy from mapped memory, so one thread stays ahead of any training step.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


class Windows:
    """Random access to a token array as overlapping windows of length + 1 + ahead tokens.

    Window i starts at token i·length. Every token but the first is therefore the next-token target
    of exactly one window. A window is {"tokens": int32[size], "segments": int32[size]}. Segments
    number the documents in the window from 1. Segment 0 is padding beyond the array's end.
    `ahead`: further tokens that multi-token prediction needs as targets. `count`: windows.
    """

    def __init__(self, array: TokenArray, length: int, ahead: int, count: int):
        self._tokens = array.tokens
        self._starts = array.starts
        self._length = length
        self._size = length + 1 + ahead
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin = index * self._length
        available = self._tokens[begin : begin + self._size]
        end = begin + len(available)
        # A position's document is the number of documents that start at or before it.
        documents = np.searchsorted(self._starts, np.arange(begin, end), side="right")
        tokens = np.zeros(self._size, np.int32)
        segments = np.zeros(self._size, np.int32)
        tokens[: len(available)] = available
        # The slice [:1], unlike [0], also works for a window that is all padding.
        segments[: len(available)] = documents - documents[:1] + 1
        return {"tokens": tokens, "segments": segments}


class WindowArrays(Protocol):
    """Further arrays for each window, by the window's number (distill.cache.TeacherCache)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]: ...


class JoinedWindows:
    """Windows with further arrays in each."""

    def __init__(self, windows: Windows, beside: WindowArrays):
        self._windows = windows
        self._beside = beside

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._windows[index] | self._beside[index]


def train_batches(
    array: TokenArray,
    length: int,
    batch: int,
    seed: int,
    *,
    ahead: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    beside: WindowArrays | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of windows, in a new order in every epoch.

    A batch is {"tokens", "segments"}: int32[rows, L + 1 + ahead], with the arrays that `beside`
    gives for each window. `rows` are the rows of the global batch that are read, as one process
    of several reads its share (parallel.rows). Unset, all B of them. The global batch does not
    depend on who reads what.

    The iterator's `get_state()` is small and JSON-serialisable, and the same for every share. After
    `set_state` the batches go on bit for bit. UserError: the array is shorter than one window.
    """
    check_seed("seed", seed)
    size = length + 1 + ahead
    if len(array.tokens) < size:
        raise UserError(
            f"the training text has {len(array.tokens)} tokens, fewer than the {size} of one "
            f"sequence (data.length={length}, {ahead} further predicted): shorten --data.length, "
            "hold less out (--data.validation-fraction) or add text"
        )
    # The last tokens, fewer than one window, are left out: training batches have no padding.
    windows: Any = Windows(array, length, ahead, (len(array.tokens) - size) // length + 1)
    if beside is not None:
        assert len(beside) >= len(windows), "there are fewer further arrays than windows"
        windows = JoinedWindows(windows, beside)
    order = grain.MapDataset.source(windows).shuffle(_grain_seed(seed)).repeat()
    return _rows(order, batch, rows)


def validation_batches(
    array: TokenArray,
    length: int,
    batch: int,
    ahead: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Every window once, in order, with windows of padding at the end of the last batch.

    Shapes and errors are those of `train_batches`, but a short array is padded.
    """
    # Rounded up twice: to whole windows, and to whole batches. The first token is no target.
    count = -(-(len(array.tokens) - 1) // length)
    windows = Windows(array, length, ahead, -(-count // batch) * batch)
    return _rows(grain.MapDataset.source(windows), batch, rows)


def shifted_targets(tokens: Any, segments: Any, length: int, offset: int = 1) -> tuple[Any, Any]:
    """(targets [B, L], mask bool[B, L]): position t predicts token t + offset.

    `tokens`, `segments`: [B, at least length + offset], NumPy or JAX. The mask is false where
    t + offset is in another document or in the padding.
    """
    segment = segments[:, :length]
    target_segment = segments[:, offset : offset + length]
    mask = (segment == target_segment) & (segment != 0)
    return tokens[:, offset : offset + length], mask


class _Share:
    """Random access to the batches of one process: of each global batch the rows it reads."""

    def __init__(self, windows: grain.MapDataset, batch: int, rows: Sequence[int] | np.ndarray):
        self._windows = windows
        self._batch = batch
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._windows) // self._batch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        found: list[Any] = [self._windows[index * self._batch + row] for row in self._rows]
        return {name: np.stack([window[name] for window in found]) for name in found[0]}


def _rows(
    windows: grain.MapDataset, batch: int, rows: Sequence[int] | np.ndarray | None
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Batches of these rows of each global batch."""
    share: Any = _Share(windows, batch, range(batch) if rows is None else rows)
    return iter(grain.MapDataset.source(share).to_iter_dataset(READ))


def _grain_seed(seed: int) -> int:
    # grain shuffles epoch e with seed + e, so neighbouring seeds would share orders. A hash does
    # not. grain takes seeds of 32 bits.
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
