"""The routed experts of a model in training: hot ones on the device, the others below it.

While a layer computes, its experts are in a layer buffer: [E, …] arrays in which each expert has
its own index. Meanwhile the buffer of the next layer is filled. The parts:

- residency: which experts stay on the device
- chunks and buffers: the device's memory, residents and layer buffers
- update_log: which updates an expert lacks
- updater, row_io, writes: the thread that brings experts up to date, and its reads and writes
- snapshot: the start of a run
- traffic: counters
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.model.trunk import Matrices
from moe_jax.placement.records.file import as_parts
from moe_jax.placement.records.host import HostRecords
from moe_jax.placement.records.store import RecordStore
from moe_jax.placement.threads import OwnerThread
from moe_jax.train.engines.tiered import snapshot
from moe_jax.train.engines.tiered.buffers import LayerBuffer, LayerBuffers
from moe_jax.train.engines.tiered.chunks import Residents, Sizes, padded, programs_of
from moe_jax.train.engines.tiered.residency import Residency
from moe_jax.train.engines.tiered.row_io import RowIO
from moe_jax.train.engines.tiered.rows import row_shapes
from moe_jax.train.engines.tiered.threads import Span, Threads
from moe_jax.train.engines.tiered.traffic import TrafficMeter
from moe_jax.train.engines.tiered.update_log import UpdateLog
from moe_jax.train.engines.tiered.updater import Updater
from moe_jax.train.engines.tiered.writes import WriteQueue


class TieredExperts:
    """Parameters, moments and gradients of all routed experts, within placement.device_budget.

    The calls of an update, in their order:

    - forward, for every layer: `prefetch`, `need`
    - backward, for every layer: `prefetch`, `need`, `put_gradient`
    - `end_update`

    All calls come from one thread (AssertionError). Three threads of its own read, bring up to
    date, and write.
    UserError: too small a budget, a disk that fails, a damaged row.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config = config
        self.shapes = row_shapes(config)
        self.sizes = Sizes(config, self.shapes)
        layers = self.sizes.layers
        experts = self.sizes.experts
        direct = config.placement.direct
        store = RecordStore.create(folder, layers, experts, self.shapes.layouts(), direct=direct)
        self.records = HostRecords(store)
        self.residency = Residency(config, self.sizes)
        self.threads = Threads()
        self.spans: list[Span] = []
        """When the threads were at work, as of the last call of `traffic`."""
        self._rows = RowIO(self.records, self.shapes, self.sizes.chunk)
        # Shared with the updater, whose thread advances the residents of a layer that is brought.
        # The update's thread writes their gradients only after that (put_gradient asserts it).
        self._residents = [self._new_residents(layer) for layer in range(layers)]
        self._log = UpdateLog(layers, experts, exact=config.placement.mode == "exact")
        self._programs = programs_of(config)
        # One layer's gradients may wait for the writing thread (Sizes counts two layers').
        self._gradient_writes = WriteQueue(self.threads, layers, limit=1)
        self._updater = Updater(
            self._rows,
            self._residents,
            self._log,
            self._programs,
            self.threads,
            gradient_writes=self._gradient_writes,
        )
        self._buffers = LayerBuffers(self.shapes, experts)
        self._last_active = [np.zeros(0, int) for _ in range(layers)]
        """Experts that were active in each layer's last update."""
        self._traffic = TrafficMeter(self.records)
        self._owner = OwnerThread("the experts in tiers")

    def initialise(self) -> None:
        """The experts of a fresh model."""
        self._owner.check()
        self.records.keep(self.residency.host_ids())
        snapshot.initialise(self.config, self._rows, self._residents)

    def restore(self, saved: RecordStore, updates: int) -> None:
        """The experts of a checkpoint, which reflects `updates` updates."""
        self._owner.check()
        self._log.restore(updates)
        self.records.keep(self.residency.host_ids())
        snapshot.restore(saved, self._rows, self._residents)

    def save(self, folder: Path) -> None:
        """Brings everything up to date and copies it, a chunk at a time, to a store in `folder`."""
        self.drain()  # the threads then wait for work, so that only save_layer's tasks run
        layouts = self.shapes.layouts()
        del layouts["gradients"]  # none is left once everything is up to date
        saved = RecordStore.create(folder, self.sizes.layers, self.sizes.experts, layouts)
        try:
            for layer in range(self.sizes.layers):
                self.threads.submit("bring", self._updater.save_layer, saved, layer).result()
            saved.finish()
        finally:
            saved.close()

    def prefetch(self, layer: int, active: Int[np.ndarray, "n"] | None = None) -> None:
        """Starts to bring the `active` experts of `layer` to a layer buffer.

        Unset, they are those of its last update: before the router has run, the best guess. Without
        such a layer nothing happens.
        """
        if 0 <= layer < self.sizes.layers:
            with self.threads.timed("wait"):  # 0, unless Threads.blocking
                self._bring(layer, self._last_active[layer] if active is None else active)

    def need(self, layer: int, active: Int[np.ndarray, "n"]) -> Matrices:
        """Waits for `active` and returns the matrices of `layer`, [E, …].

        Rows of experts that are neither active nor resident hold any finite values.
        """
        with self.threads.timed("wait"):
            buffer = self._bring(layer, active)
            buffer.wait()
        return buffer.matrices

    def put_gradient(self, layer: int, active: Int[np.ndarray, "n"], gradients: Matrices) -> None:
        """Stores the gradients, [E, …], of the experts that were active.

        They count once `end_update` reports a finite update.
        """
        self._owner.check()
        assert not self._buffers.busy(layer), f"layer {layer} is still being brought up to date"
        self._log.void(layer, active)
        for chunk in self._residents[layer].chunks:
            places = padded(chunk.ids.astype(np.int32), self.sizes.chunk)
            chunk.rows["gradients"] = self._programs.take(gradients, places)
        cold = np.setdiff1d(active, self._residents[layer].ids)

        def write() -> None:
            parts = as_parts([np.asarray(gradient) for gradient in gradients])
            # Run by run, since rows of a run are views: rows picked by `cold` would be a copy.
            for run in _runs(cold):
                own = slice(run[0], run[-1] + 1)
                self.records.write("gradients", layer, run, [part[own] for part in parts])

        with self.threads.timed("wait"):  # for room
            self._gradient_writes.submit(layer, write, gradients)

    def end_update(self, active: list[Int[np.ndarray, "n"]], finite: bool, norm: float) -> None:
        """Ends an update. If it was `finite`, its gradients count, clipped by `norm`."""
        self._owner.check()
        self._buffers.empty()
        if finite:
            self._log.record(active, norm)
        for ids, residents in zip(active, self._residents, strict=True):
            self._traffic.used(ids, residents.ids)
        self._last_active = active
        # None where nothing was decided. An empty list still refreshes host memory.
        changed = self.residency.observe(active)
        if changed is not None:
            self.drain()
            for layer in changed:
                before = self._residents[layer]
                self._residents[layer] = self._new_residents(layer)
                snapshot.exchange(self._rows, layer, before, self._residents[layer])
            self.records.keep(self.residency.host_ids())

    def drain(self) -> None:
        """Returns when no transfer is under way. UserError: one has failed."""
        self._owner.check()
        self._buffers.wait()
        self._gradient_writes.wait_all()
        self._updater.wait()

    def traffic(self) -> dict[str, Any]:
        """Bytes moved since the last call, and the most bytes that experts take on the device."""
        self.spans = self.threads.take_spans()
        return {**self._traffic.report(self.spans), "device_expert_bytes": self.sizes.device}

    def close(self) -> None:
        """Ends the threads and removes the store: checkpoints hold what must be kept."""
        self.threads.close()
        self.records.store.close()
        self.records.store.remove()

    def _new_residents(self, layer: int) -> Residents:
        return Residents(self.residency.resident_ids(layer), self.sizes.chunk, self.shapes)

    def _bring(self, layer: int, active: np.ndarray) -> LayerBuffer:
        """The buffer of `layer`, with a transfer under way for the experts that it lacks."""
        self._owner.check()
        buffer = self._buffers.of(layer)
        # Residents come along: placed chunk by chunk, they cost no read.
        wanted = np.union1d(active, self._residents[layer].ids)
        missing = wanted[~buffer.filled[wanted]]
        if len(missing) or buffer.job is None:
            before = buffer.job
            buffer.filled[missing] = True  # on their way: a second call must not bring them again

            def fill() -> None:
                if before is not None:
                    before.result()  # one thread, so it is done, but it may have failed
                self._updater.fill(buffer, layer, missing)

            buffer.job = self.threads.submit("bring", fill)
        return buffer


def _runs(ids: np.ndarray) -> list[np.ndarray]:
    """`ids` (ascending) split where they are not adjacent."""
    return np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
