"""The routed experts of a model in training: hot ones on the device, the others on a shelf.

An update that touches an expert only leaves its gradient; the expert is *brought up to date* when
it is next needed (Due in tier_parts). So the backward pass writes gradients alone, and clipping by
the global norm, which is known only after it, needs no second pass. A layer's turn has its experts
in a slab, [E, …] arrays at their natural indices; the slab of the next layer is read meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.placement.place import Placement
from moe_jax.placement.policy import make_policy
from moe_jax.placement.shelf import Shelf, as_parts
from moe_jax.train.engines.tiered.chunks import Residents, Sizes, Slab, padded, programs_of
from moe_jax.train.engines.tiered.rows import Due, row_shapes
from moe_jax.train.engines.tiered.threads import Span, Threads
from moe_jax.train.engines.tiered.trunk import Matrices, init_experts

DECIDE_EVERY = 50
"""Updates between two decisions on who is resident."""
HYSTERESIS = 0.25
"""A newcomer's worth must exceed a resident's by this fraction."""


@dataclass
class Uses:
    """Counts since the last `TieredExperts.traffic`."""

    uses: int = 0
    hits: int = 0
    start: dict[str, int] = field(default_factory=dict)


class TieredExperts:
    """Parameters, moments and gradients of all routed experts, within placement.device_budget.

    An update calls, in this order: for every layer forward `prefetch` and `need`; for every layer
    backward `prefetch`, `need` and `put_gradient`; then `end_update`. Use it from one thread;
    three of its own read, bring up to date, and write. UserError: too small a budget, a disk that
    fails, a damaged row.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        shapes, placement = row_shapes(config), config.placement
        self.config, self.shapes, self.sizes = config, shapes, Sizes(config, shapes)
        layers, experts = self.sizes.layers, self.sizes.experts
        self.shelf = Shelf(folder, layers, experts, shapes.kinds(), direct=placement.direct)
        self.exact, self.updates, self.tried = placement.mode == "exact", 0, 0
        self.made = np.full((layers, experts), -1, np.int32)
        """Update that the gradient row belongs to; -1: it is void or used up."""
        self.norm = np.zeros((layers, experts), np.float32)
        self.upto = np.zeros((layers, experts), np.int32)
        """exact: updates that the rows reflect."""
        policy = make_policy(placement.policy, layers * experts, layers)
        policy.hysteresis = HYSTERESIS if placement.policy != "lru" else 0.0
        capacity = self.sizes.quota * layers
        self.placement = Placement(policy, layers, experts, capacity, "quota")
        self.placement.fill()
        self.last = [np.zeros(0, int) for _ in range(layers)]
        """Experts that were active in each layer's last update."""
        self._programs = programs_of(config)
        self._slabs: list[Slab] = []
        self._residents: list[Residents] = []
        self._writes: list[list[Future[None]]] = [[] for _ in range(layers)]
        self._outstanding: deque[Future[None]] = deque()
        self._gradients: deque[Future[None]] = deque()
        self.threads, self._used = Threads(), Uses()
        self.spans: list[Span] = []
        """What was done when, up to the last `traffic`."""

    # What lives where, from the start on.

    def initialise(self) -> None:
        """The experts of a fresh model, a layer at a time."""
        self.shelf.keep(self._host_ids())
        make = jax.jit(init_experts, static_argnums=0)
        for layer in range(self.sizes.layers):
            matrices = [np.asarray(m) for m in make(self.config, jnp.int32(layer))]
            held = self._add_residents(layer)
            held.load("parameters", [m[held.ids] for m in matrices])
            cold = np.setdiff1d(np.arange(self.sizes.experts), held.ids)
            self._write("parameters", layer, cold, [m[cold] for m in matrices])

    def restore(self, saved: Shelf, updates: int) -> None:
        """The experts of a checkpoint, which reflects `updates` updates."""
        self.updates, self.upto[:] = updates, updates
        self.shelf.keep(self._host_ids())
        for layer in range(self.sizes.layers):
            held = self._add_residents(layer)
            for kind in ("parameters", "moments"):
                held.load(kind, self._copy(saved, kind, layer, held.ids))

    def _copy(self, saved: Shelf, kind: str, layer: int, residents: np.ndarray) -> list[np.ndarray]:
        """Rows of a layer to the shelf; returns those of `residents`."""
        kept = self._blank(kind, len(residents))
        for rows in self._chunks(np.arange(self.sizes.experts)):
            found = [part[: len(rows)] for part in self._read_from(saved, kind, layer, rows)]
            inside = np.isin(rows, residents)
            self._write(kind, layer, rows[~inside], [part[~inside] for part in found])
            for part, new in zip(kept, found, strict=True):
                part[np.isin(residents, rows)] = new[inside]
        return kept

    def _blank(self, kind: str, count: int) -> list[np.ndarray]:
        shapes = self.shapes.moments if kind == "moments" else self.shapes.parameters
        return [np.empty((count, *s.shape), s.dtype) for s in shapes]

    def _add_residents(self, layer: int) -> Residents:
        held = Residents(self._resident_ids(layer), self.sizes.chunk, self.shapes)
        self._residents.append(held)
        return held

    def _resident_ids(self, layer: int) -> np.ndarray:
        experts = self.sizes.experts
        return np.flatnonzero(self.placement.resident[layer * experts : (layer + 1) * experts])

    def _host_ids(self) -> np.ndarray:
        """The most worthy experts that are not resident, as many as host memory may hold."""
        below = np.flatnonzero(~self.placement.resident)
        order = np.argsort(-self.placement.policy.worth(below), kind="stable")
        return np.sort(below[order[: self.sizes.host]])

    # A layer's turn.

    def prefetch(self, layer: int, active: Int[np.ndarray, "n"] | None = None) -> None:
        """Starts to bring `active` of `layer` (unset: those of its last update) to a slab, unless
        there is no such layer."""
        if 0 <= layer < self.sizes.layers:
            with self.threads.noted("wait"):  # unless they are blocking, for nothing
                self._start(layer, self.last[layer] if active is None else active)

    def need(self, layer: int, active: Int[np.ndarray, "n"]) -> Matrices:
        """The slab of `layer` with at least `active`, once it is there."""
        with self.threads.noted("wait"):
            slab = self._start(layer, active)
            assert slab.job is not None
            slab.job.result()
        return slab.matrices

    def put_gradient(self, layer: int, active: Int[np.ndarray, "n"], gradients: Matrices) -> None:
        """Keeps the gradients, [E, …], of the experts that were active, until `end_update` says
        what they are worth."""
        self.made[layer, active] = -1
        for held in self._residents[layer].chunks:
            held.rows["gradients"] = self._programs.take(gradients, self._places(held.ids))
        cold = np.setdiff1d(active, self._residents[layer].ids)

        def write() -> None:
            parts = [np.asarray(g) for g in gradients]
            views = as_parts(parts)
            for run in _runs(cold):
                at = slice(run[0], run[-1] + 1)
                self.shelf.write("gradients", layer, run, [view[at] for view in views])

        with self.threads.noted("wait"):  # for room
            self._gradients.append(self._submit_write(layer, write, gradients))
            while len(self._gradients) > 1:
                self._gradients.popleft().result()

    def end_update(self, active: list[np.ndarray], finite: bool, norm: float) -> None:
        """The update that made the last gradients is over: they count, clipped by `norm`, unless
        it was not `finite`."""
        for layer, ids in enumerate(active):
            if finite:
                self.made[layer, ids], self.norm[layer, ids] = self.updates, norm
            hits = np.isin(ids, self._residents[layer].ids).sum()
            self._used.uses, self._used.hits = self._used.uses + len(ids), self._used.hits + hits
        self.updates, self.tried, self.last = self.updates + finite, self.tried + 1, active
        for slab in self._slabs:
            slab.filled[:] = False
        if self.tried % DECIDE_EVERY == 0:
            self._decide()
        else:
            for layer, ids in enumerate(active):
                self.placement.policy.use(layer * self.sizes.experts + ids)

    def _start(self, layer: int, wanted: np.ndarray) -> Slab:
        slab = self._slab(layer)
        wanted = np.union1d(wanted, self._residents[layer].ids)
        missing = wanted[~slab.filled[wanted]]
        if len(missing) or slab.job is None:
            before = slab.job
            slab.filled[missing] = True

            def job() -> None:
                if before is not None:
                    before.result()
                self._fill(slab, layer, missing)

            slab.job = self.threads.submit("bring", job)
        return slab

    def _slab(self, layer: int) -> Slab:
        """The one of `layer`; else the other than the last one asked for, emptied."""
        for slab in self._slabs:
            if slab.layer == layer:
                self._slabs.remove(slab)
                self._slabs.append(slab)
                return slab
        if len(self._slabs) < 2:
            shapes, experts = self.shapes.parameters, self.sizes.experts
            matrices = tuple(jnp.zeros((experts, *s.shape), s.dtype) for s in shapes)
            slab = Slab(matrices, np.zeros(experts, bool))
        else:
            slab = self._slabs.pop(0)
            if slab.job is not None:
                slab.job.result()
        slab.layer, slab.job, slab.filled[:] = layer, None, False
        self._slabs.append(slab)
        return slab

    # In the thread that brings.

    def _fill(self, slab: Slab, layer: int, ids: np.ndarray) -> None:
        held = self._residents[layer]
        self._advance_residents(layer)
        cold = np.setdiff1d(ids, held.ids)
        if len(cold) < len(ids):  # residents, then: they come together
            for chunk in held.chunks:
                self._place(slab, chunk.ids, chunk.rows["parameters"])
        for rows, parameters in self._up_to_date(layer, cold):
            self._place(slab, rows, parameters)
        jax.block_until_ready(slab.matrices)

    def _place(self, slab: Slab, ids: np.ndarray, rows: Matrices) -> None:
        count = np.int32(len(ids))
        slab.matrices = self._programs.place(slab.matrices, rows, self._places(ids), count)

    def _places(self, ids: np.ndarray) -> np.ndarray:
        return padded(ids.astype(np.int32), self.sizes.chunk)

    def _advance_residents(self, layer: int) -> None:
        for held in self._residents[layer].chunks:
            due, rows = self._due(layer, held.ids, self.sizes.chunk), held.rows
            if np.any(due.stop > due.start):
                rows["parameters"], rows["moments"] = self._programs.advance(
                    rows["parameters"], rows["moments"], rows["gradients"], due
                )
                self._mark(layer, held.ids)

    def _up_to_date(self, layer: int, ids: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
        """(experts, their parameters [chunk, …]) for all of `ids`, a chunk at a time: the next one
        is read while this one is used, and what changed is written back."""
        for written in self._writes[layer]:
            written.result()
        self._writes[layer] = []
        due = self._due(layer, ids)
        behind = due.stop > due.start
        chunks = [(rows, True) for rows in self._chunks(ids[behind])]
        chunks += [(rows, False) for rows in self._chunks(ids[~behind])]
        kinds = {True: ("parameters", "moments", "gradients"), False: ("parameters",)}

        def read(rows: np.ndarray, late: bool) -> list[list[np.ndarray]]:
            return [self._read_from(self.shelf, kind, layer, rows) for kind in kinds[late]]

        reading = [self.threads.submit("read", read, *chunk) for chunk in chunks[:1]]
        for index, (rows, late) in enumerate(chunks):
            found = reading.pop().result()
            following = chunks[index + 1 : index + 2]
            reading += [self.threads.submit("read", read, *chunk) for chunk in following]
            if late:
                yield rows, self._advance_rows(layer, rows, *found)
            else:
                yield rows, tuple(found[0])

    def _advance_rows(self, layer: int, rows: np.ndarray, *found: list[np.ndarray]) -> Matrices:
        due = self._due(layer, rows, self.sizes.chunk)
        parameters, moments = self._programs.advance(*map(tuple, found), due)
        jax.block_until_ready((parameters, moments))
        for kind, arrays in (("parameters", parameters), ("moments", moments)):
            self._write_later(kind, layer, rows, arrays)
        self._mark(layer, rows)
        return parameters

    def _due(self, layer: int, ids: np.ndarray, size: int = 0) -> Due:
        """Of `ids`, and of nobody up to `size`."""
        made = self.made[layer, ids]
        if self.exact:
            start = self.upto[layer, ids]
            stop = np.full_like(start, self.updates)
        else:
            start, stop = np.maximum(made, 0), made + 1
        found = start, np.maximum(start, stop), made, self.norm[layer, ids]
        return Due(*(padded(part, max(size, len(ids))) for part in found))

    def _mark(self, layer: int, ids: np.ndarray) -> None:
        self.made[layer, ids], self.upto[layer, ids] = -1, self.updates

    def _chunks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, len(ids), self.sizes.chunk):
            yield ids[begin : begin + self.sizes.chunk]

    def _read_from(self, shelf: Shelf, kind: str, layer: int, rows: np.ndarray) -> list[np.ndarray]:
        """The rows, padded to a chunk, in memory of their own: JAX may keep it as it is."""
        arrays = self._blank(kind, self.sizes.chunk)
        shelf.read(kind, layer, rows, [part[: len(rows)] for part in as_parts(arrays)])
        for array in arrays:
            array[len(rows) :] = 0
        return arrays

    # Writing.

    def _write(self, kind: str, layer: int, rows: np.ndarray, arrays: list[np.ndarray]) -> None:
        if len(rows):
            arrays = [np.ascontiguousarray(array) for array in arrays]
            self.shelf.write(kind, layer, rows, as_parts(arrays))

    def _write_later(self, kind: str, layer: int, rows: np.ndarray, arrays: Matrices) -> None:
        """Hands rows to the writer; waits while it has more than two chunks before it."""

        def write() -> None:
            self.shelf.write(
                kind,
                layer,
                rows,
                [part[: len(rows)] for part in as_parts([*map(np.asarray, arrays)])],
            )

        self._outstanding.append(self._submit_write(layer, write, arrays))
        while len(self._outstanding) > 4:
            self._outstanding.popleft().result()

    def _submit_write(
        self, layer: int, write: Callable[[], None], arrays: Matrices
    ) -> "Future[None]":
        future = self.threads.submit("write", write, computed=arrays)
        self._writes[layer].append(future)
        return future

    def drain(self) -> None:
        """Returns when nothing is being moved any more."""
        for slab in self._slabs:
            if slab.job is not None:
                slab.job.result()
        for written in self._writes:
            while written:
                written.pop().result()
        self._outstanding.clear()
        self._gradients.clear()

    # Who is resident.

    def _decide(self) -> None:
        self.drain()
        for layer, ids in enumerate(self.last):
            change = self.placement.use(layer, ids)
            if change.admitted:
                self._swap(layer)
        self.shelf.keep(self._host_ids())

    def _swap(self, layer: int) -> None:
        """Makes the residents of a layer those that the placement names."""
        held, ids = self._residents[layer], self._resident_ids(layer)
        new = Residents(ids, self.sizes.chunk, self.shapes)
        stays, leaves = np.isin(ids, held.ids), ~np.isin(held.ids, ids)
        for kind in ("parameters", "moments", "gradients"):
            before, after = held.on_host(kind), self._blank(kind, len(ids))
            self._write(kind, layer, held.ids[leaves], [part[leaves] for part in before])
            for part, old in zip(after, before, strict=True):
                part[stays] = old[~leaves]
            for places in self._chunks(np.flatnonzero(~stays)):
                found = self._read_from(self.shelf, kind, layer, ids[places])
                for part, arrived in zip(after, found, strict=True):
                    part[places] = arrived[: len(places)]
            new.load(kind, after)
        self._residents[layer] = new

    # Checkpoints and reports.

    def save(self, folder: Path) -> None:
        """Brings everything up to date and copies it, a chunk at a time, to a shelf in `folder`."""
        self.drain()
        kinds = {kind: self.shelf.kinds[kind] for kind in ("parameters", "moments")}
        saved = Shelf(folder, self.sizes.layers, self.sizes.experts, kinds)
        try:
            for layer in range(self.sizes.layers):
                self.threads.submit("bring", self._save_layer, saved, layer).result()
            saved.finish()
        finally:
            saved.close()

    def _save_layer(self, saved: Shelf, layer: int) -> None:
        self._advance_residents(layer)
        held = self._residents[layer]
        for kind in ("parameters", "moments"):
            if len(held.ids):
                saved.write(kind, layer, held.ids, as_parts(held.on_host(kind)))
        cold = np.setdiff1d(np.arange(self.sizes.experts), held.ids)
        for rows, _ in self._up_to_date(layer, cold):
            for written in self._writes[layer]:
                written.result()
            for kind in ("parameters", "moments"):
                parts = as_parts(self._read_from(self.shelf, kind, layer, rows))
                saved.write(kind, layer, rows, [part[: len(rows)] for part in parts])

    def traffic(self) -> dict[str, Any]:
        """What was moved since the last call, and what the experts take on the device at most."""
        now, used = vars(self.shelf.moved).copy(), self._used
        self._used, self.spans = Uses(start=now), self.threads.take_spans()
        waited = sum(span.end - span.begin for span in self.spans if span.what == "wait")
        moved = {f"{kind}_bytes": now[kind] - used.start.get(kind, 0) for kind in now}
        return {
            **moved,
            "expert_hit_rate": float(used.hits / used.uses) if used.uses else 1.0,
            "expert_wait_seconds": waited,
            "device_expert_bytes": self.sizes.device,
        }

    def close(self) -> None:
        """Ends the threads and removes the shelf: checkpoints hold what is worth keeping."""
        self.threads.close()
        self.shelf.close()
        self.shelf.remove()


def _runs(ids: np.ndarray) -> list[np.ndarray]:
    """`ids` (ascending) split where they are not adjacent."""
    return np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
