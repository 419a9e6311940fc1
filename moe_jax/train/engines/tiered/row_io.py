"""Rows of experts as arrays, read from and written to the tiers below the device."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from moe_jax.placement.records.file import Parts, as_parts
from moe_jax.train.engines.tiered.rows import RowShapes


class Records(Protocol):
    """RecordStore, or HostRecords above it."""

    def read(self, kind: str, layer: int, experts: np.ndarray, parts: Parts) -> None: ...

    def write(self, kind: str, layer: int, experts: np.ndarray, parts: Parts) -> None: ...


class RowIO:
    """Moves rows of `records`, at most `chunk` experts at a time. Threads: as `records`."""

    def __init__(self, records: Records, shapes: RowShapes, chunk: int) -> None:
        self.records = records
        self.shapes = shapes
        self.chunk = chunk

    def over(self, records: Records) -> "RowIO":
        """The same for other records."""
        return RowIO(records, self.shapes, self.chunk)

    def chunks(self, ids: Int[np.ndarray, "n"]) -> Iterator[Int[np.ndarray, "m"]]:
        """`ids`, a chunk at a time."""
        for begin in range(0, len(ids), self.chunk):
            yield ids[begin : begin + self.chunk]

    def blank(self, kind: str, count: int) -> list[np.ndarray]:
        """Arrays for `count` rows, not initialised."""
        return [np.empty((count, *s.shape), s.dtype) for s in self.shapes.of(kind)]

    def read(self, kind: str, layer: int, rows: Int[np.ndarray, "n"]) -> list[np.ndarray]:
        """The rows (ascending), padded with zeros to a chunk."""
        # New memory each time: JAX on a CPU may use an array without copying it, so it must never
        # be written again.
        arrays = self.blank(kind, self.chunk)
        self.records.read(kind, layer, rows, [part[: len(rows)] for part in as_parts(arrays)])
        for array in arrays:
            array[len(rows) :] = 0
        return arrays

    def write(
        self, kind: str, layer: int, rows: Int[np.ndarray, "n"], arrays: Sequence[Any]
    ) -> None:
        """Stores the first n rows of the arrays (NumPy or JAX) as those of `rows` (ascending)."""
        if len(rows):
            parts = as_parts([np.ascontiguousarray(array) for array in arrays])
            self.records.write(kind, layer, rows, [part[: len(rows)] for part in parts])
