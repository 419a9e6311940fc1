"""The thread that brings experts: up to date, to a layer buffer or to a checkpoint."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from moe_jax.model.trunk import Matrices
from moe_jax.placement.records.store import RecordStore
from moe_jax.placement.threads import OwnerThread
from moe_jax.train.engines.tiered.buffers import LayerBuffer
from moe_jax.train.engines.tiered.chunks import KINDS, Programs, Residents, padded
from moe_jax.train.engines.tiered.row_io import RowIO
from moe_jax.train.engines.tiered.threads import Threads
from moe_jax.train.engines.tiered.update_log import UpdateLog
from moe_jax.train.engines.tiered.writes import WriteQueue

ROW_WRITES = 4
"""Writes of rows that may wait for the writing thread. A chunk has two, parameters and moments."""


class Updater:
    """Methods of the thread "bring", and of no other (AssertionError).

    While it works on a layer, the update's thread leaves the residents and the log of that layer
    alone (TieredExperts asserts it).
    """

    def __init__(
        self,
        rows: RowIO,
        residents: list[Residents],
        log: UpdateLog,
        programs: Programs,
        threads: Threads,
        *,
        gradient_writes: WriteQueue,
    ) -> None:
        self._rows = rows
        self._residents = residents
        self._log = log
        self._programs = programs
        self._threads = threads
        self._gradient_writes = gradient_writes
        self._row_writes = WriteQueue(threads, len(residents), ROW_WRITES)
        self._owner = OwnerThread("the updater of experts")

    def fill(self, buffer: LayerBuffer, layer: int, ids: Int[np.ndarray, "n"]) -> None:
        """Brings `ids` of `layer` up to date and to the buffer."""
        self._owner.check()
        residents = self._residents[layer]
        self._advance_residents(layer)
        cold = np.setdiff1d(ids, residents.ids)
        if len(cold) < len(ids):  # residents are among them, and are always placed all together
            for chunk in residents.chunks:
                self._place(buffer, chunk.ids, chunk.rows["parameters"])
        for rows, parameters in self._up_to_date(layer, cold):
            self._place(buffer, rows, parameters)
        # The future of this call promises that the matrices are there (TieredExperts.need).
        jax.block_until_ready(buffer.matrices)

    def save_layer(self, saved: RecordStore, layer: int) -> None:
        """Brings all experts of `layer` up to date and copies them to `saved`."""
        self._owner.check()
        self._advance_residents(layer)
        residents = self._residents[layer]
        copies = self._rows.over(saved)
        kinds = ("parameters", "moments")
        for kind in kinds:
            if len(residents.ids):
                copies.write(kind, layer, residents.ids, residents.on_host(kind))
        cold = np.setdiff1d(np.arange(saved.experts), residents.ids)
        for rows, _ in self._up_to_date(layer, cold):
            self._row_writes.wait(layer)
            for kind in kinds:
                copies.write(kind, layer, rows, self._rows.read(kind, layer, rows))

    def wait(self) -> None:
        """Returns when all rows brought up to date are written. Any thread may call it."""
        self._row_writes.wait_all()

    def _place(self, buffer: LayerBuffer, ids: np.ndarray, rows: Matrices) -> None:
        places = padded(ids.astype(np.int32), self._rows.chunk)
        buffer.matrices = self._programs.place(buffer.matrices, rows, places, np.int32(len(ids)))

    def _advance_residents(self, layer: int) -> None:
        for chunk in self._residents[layer].chunks:
            pending = self._log.pending(layer, chunk.ids, self._rows.chunk)
            if np.any(pending.stop > pending.start):
                parameters, moments = self._programs.advance(
                    *(chunk.rows[kind] for kind in KINDS), pending
                )
                chunk.rows["parameters"] = parameters
                chunk.rows["moments"] = moments
                self._log.applied(layer, chunk.ids)

    def _up_to_date(self, layer: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
        """(experts, their parameters [chunk, …]) for all of `ids`, a chunk at a time.

        The next chunk is read while this one is used. Rows that changed are written back.
        """
        # Rows are read below, so earlier writes of this layer must have ended.
        self._gradient_writes.wait(layer)
        self._row_writes.wait(layer)
        pending = self._log.pending(layer, ids)
        # Experts that lack nothing need no moments and no gradient: a third of the bytes or less.
        behind = pending.stop > pending.start
        chunks = [(rows, KINDS) for rows in self._rows.chunks(ids[behind])]
        chunks += [(rows, KINDS[:1]) for rows in self._rows.chunks(ids[~behind])]

        def read(rows: np.ndarray, kinds: tuple[str, ...]) -> list[tuple[Any, ...]]:
            return [tuple(self._rows.read(kind, layer, rows)) for kind in kinds]

        reading = [self._threads.submit("read", read, *chunk) for chunk in chunks[:1]]
        for index, (rows, kinds) in enumerate(chunks):
            arrays = reading.pop().result()
            following = chunks[index + 1 : index + 2]
            reading += [self._threads.submit("read", read, *chunk) for chunk in following]
            yield rows, self._advance(layer, rows, arrays) if kinds == KINDS else arrays[0]

    def _advance(self, layer: int, rows: np.ndarray, arrays: list[Matrices]) -> Matrices:
        """The parameters after the pending updates. New rows go to the writing thread."""
        pending = self._log.pending(layer, rows, self._rows.chunk)
        parameters, moments = self._programs.advance(*arrays, pending)
        jax.block_until_ready((parameters, moments))
        self._write_later("parameters", layer, rows, parameters)
        self._write_later("moments", layer, rows, moments)
        self._log.applied(layer, rows)
        return parameters

    def _write_later(self, kind: str, layer: int, rows: np.ndarray, arrays: Matrices) -> None:
        def write() -> None:
            self._rows.write(kind, layer, rows, arrays)

        self._row_writes.submit(layer, write, arrays)
