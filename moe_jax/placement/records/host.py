"""Records in host memory above those on disk: a tier of its own, between device and disk."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from moe_jax.placement.records.file import Parts
from moe_jax.placement.records.store import ByteCounter, RecordStore
from moe_jax.placement.threads import AccessGuard

WHOLE = np.array([0])
"""The guard protects one thing: which experts are in host memory."""


class HostRecords:
    """Reads and writes records in host memory where `keep` has put them, and else in `store`.

    The record on disk is stale while its expert is in host memory. It is written when the expert
    leaves. Threads: as RecordStore, but `keep` must run alone (AssertionError).
    """

    def __init__(self, store: RecordStore) -> None:
        self.store = store
        self.moved = ByteCounter()
        """Bytes in host memory."""
        self._rows: dict[int, dict[str, np.ndarray]] = {}
        """By layer · E + expert, the written records, as bytes."""
        self._guard = AccessGuard("records in host memory", len(WHOLE))

    def read(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Fills `parts` with the records of `experts` (ascending)."""
        with self._guard.shared(WHOLE):
            for run, rows in self._runs(layer, experts):
                own = [part[run] for part in parts]
                if rows is None:
                    self.store.read(kind, layer, experts[run], own)
                else:
                    self._load(rows.get(kind), own)

    def write(self, kind: str, layer: int, experts: Int[np.ndarray, "n"], parts: Parts) -> None:
        """Stores the records of `experts` (ascending)."""
        with self._guard.shared(WHOLE):
            for run, rows in self._runs(layer, experts):
                own = [part[run] for part in parts]
                if rows is None:
                    self.store.write(kind, layer, experts[run], own)
                else:
                    rows[kind] = np.concatenate([part[0] for part in own])
                    self.moved.add(written=rows[kind].size)

    def keep(self, ids: Int[np.ndarray, "n"]) -> None:
        """From now on exactly the experts layer · E + expert in `ids` are in host memory."""
        wanted = set(ids.tolist())
        with self._guard.exclusive(WHOLE):
            # Leaving first: host memory never holds more than the larger of the two sets.
            for leaving in sorted(self._rows.keys() - wanted):
                self._write_back(leaving, self._rows.pop(leaving))
            for entering in sorted(wanted - self._rows.keys()):
                self._rows[entering] = self._read_all(entering)

    def _runs(
        self, layer: int, experts: np.ndarray
    ) -> Iterator[tuple[slice, dict[str, np.ndarray] | None]]:
        """Slices of `experts`, each either one expert with its rows in host memory, or experts
        that are all on disk (None)."""
        begin = 0
        for index, expert in enumerate(experts):
            rows = self._rows.get(layer * self.store.experts + int(expert))
            if rows is None:
                continue
            if begin < index:
                yield slice(begin, index), None
            yield slice(index, index + 1), rows
            begin = index + 1
        if begin < len(experts):
            yield slice(begin, len(experts)), None

    def _load(self, row: np.ndarray | None, parts: Parts) -> None:
        begin = 0
        for part in parts:
            part[0] = 0 if row is None else row[begin : begin + part.shape[1]]
            begin += part.shape[1]
        self.moved.add(read=begin)

    def _write_back(self, identifier: int, rows: dict[str, np.ndarray]) -> None:
        layer, expert = divmod(identifier, self.store.experts)
        for kind, row in rows.items():
            # A row of all fields is as good as its fields: a checksum runs on over the parts.
            self.store.write(kind, layer, np.array([expert]), [row[None]])

    def _read_all(self, identifier: int) -> dict[str, np.ndarray]:
        layer, expert = divmod(identifier, self.store.experts)
        rows: dict[str, np.ndarray] = {}
        for kind, layout in self.store.layouts.items():
            if self.store.written(kind, layer, expert):
                rows[kind] = np.empty(layout.size, np.uint8)
                self.store.read(kind, layer, np.array([expert]), [rows[kind][None]])
        return rows
