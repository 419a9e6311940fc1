"""The routed experts of a model in training: hot ones on the device, the others on a shelf.

An update that touches an expert only leaves its gradient; the expert is *brought up to date* when
it is next needed (Due in tier_parts). So the backward pass writes gradients alone, and clipping by
the global norm, which is known only after it, needs no second pass. A layer's turn has its experts
in a slab, [E, …] arrays at their natural indices; the slab of the next layer is read meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Int

from moe_jax.config import PlacementConfig, TrainConfig, require
from moe_jax.placement.place import Placement
from moe_jax.placement.policy import make_policy
from moe_jax.placement.shelf import Shelf, as_parts
from moe_jax.train.tier_parts import (
    Due,
    Matrices,
    RowShapes,
    init_experts,
    make_advance,
    row_shapes,
)

DECIDE_EVERY = 50
"""Updates between two decisions on who is resident."""
HYSTERESIS = 0.25
"""A newcomer's worth must exceed a resident's by this fraction."""


@dataclass(eq=False)
class Slab:
    """The matrices of one layer's experts on the device; rows that are not `filled` are anything
    finite, computed with weight 0 and never read."""

    matrices: Matrices
    filled: Bool[np.ndarray, "E"]
    layer: int = -1
    job: "Future[None] | None" = None


@dataclass(eq=False)
class Residents:
    """The experts of one layer that stay on the device, in ascending order: [R, …] arrays."""

    ids: Int[np.ndarray, "R"]
    parameters: Matrices
    moments: Matrices
    gradients: Matrices


@dataclass
class Uses:
    """Counts since the last `TieredExperts.traffic`."""

    uses: int = 0
    hits: int = 0
    waited: float = 0.0
    """Seconds that the update waited for experts, or for room to write gradients."""
    start: dict[str, int] = field(default_factory=dict)


class Sizes:
    """How a device budget is spent. UserError: it is below one layer's working set."""

    def __init__(self, config: TrainConfig, shapes: RowShapes) -> None:
        model, moe = config.resolved_model(), config.model.moe
        self.layers, self.experts = model.moe_layers, moe.experts
        self.chunk = max(1, moe.experts // 16)
        """Experts that are brought up to date together."""
        own, record = shapes.parameter_bytes, shapes.record_bytes
        # Two slabs and two layers' gradients (at work, and read ahead or being written), and two
        # chunks on their way in and out.
        slabs = 4 * self.experts * own
        self.working = slabs + 2 * self.chunk * (2 * record - own)
        budget = config.placement.device_bytes
        require(
            budget >= self.working,
            f"placement.device_budget={config.placement.device_budget} is below one layer's "
            f"working set: {self.experts} experts of {own} bytes (two layers' matrices and "
            f"gradients, and {2 * self.chunk} whole records on their way) need at least "
            f"{self.working} bytes",
        )
        self.quota = min(self.experts, (budget - self.working) // record // self.layers)
        """Residents in each layer."""
        self.device = self.working + self.quota * self.layers * record
        self.host = config.placement.host_bytes // sum(map(sum, shapes.kinds().values()))


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
        self._programs = _programs(replace(config, placement=PlacementConfig(), out=""))
        self._slabs: list[Slab] = []
        self._residents: list[Residents] = []
        self._writes: list[list[Future[None]]] = [[] for _ in range(layers)]
        self._outstanding: deque[Future[None]] = deque()
        self._gradients: deque[Future[None]] = deque()
        self._reader, self._mover, self._writer = (ThreadPoolExecutor(1) for _ in range(3))
        self._used = Uses()

    # What lives where, from the start on.

    def initialise(self) -> None:
        """The experts of a fresh model, a layer at a time."""
        self.shelf.keep(self._host_ids())
        make = jax.jit(init_experts, static_argnums=0)
        for layer in range(self.sizes.layers):
            matrices = make(self.config, jnp.int32(layer))
            self._settle(layer, matrices)

    def _settle(self, layer: int, matrices: Matrices) -> None:
        ids = self._resident_ids(layer)
        parameters = self._programs.take(matrices, ids) if len(ids) else ()
        self._residents.append(self._blank_residents(ids, parameters))
        cold = np.setdiff1d(np.arange(self.sizes.experts), ids)
        self._write("parameters", layer, cold, [np.asarray(m)[cold] for m in matrices])

    def restore(self, saved: Shelf, updates: int) -> None:
        """The experts of a checkpoint, which reflects `updates` updates."""
        self.updates, self.upto[:] = updates, updates
        self.shelf.keep(self._host_ids())
        for layer in range(self.sizes.layers):
            ids = self._resident_ids(layer)
            self._residents.append(self._blank_residents(ids, ()))
            for rows in self._chunks(np.arange(self.sizes.experts)):
                for kind in ("parameters", "moments"):
                    held = self._read_from(saved, kind, layer, rows)
                    inside = np.isin(rows, ids)
                    self._write(kind, layer, rows[~inside], [h[: len(rows)][~inside] for h in held])
                    self._into_residents(
                        kind, layer, rows[inside], [h[: len(rows)][inside] for h in held]
                    )

    def _resident_ids(self, layer: int) -> np.ndarray:
        experts = self.sizes.experts
        return np.flatnonzero(self.placement.resident[layer * experts : (layer + 1) * experts])

    def _host_ids(self) -> np.ndarray:
        """The most worthy experts that are not resident, as many as host memory may hold."""
        below = np.flatnonzero(~self.placement.resident)
        order = np.argsort(-self.placement.policy.worth(below), kind="stable")
        return np.sort(below[order[: self.sizes.host]])

    def _blank_residents(self, ids: np.ndarray, parameters: Matrices) -> Residents:
        def zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> Matrices:
            return tuple(jnp.zeros((len(ids), *s.shape), s.dtype) for s in shapes)

        own = self.shapes.parameters
        return Residents(ids, parameters or zeros(own), zeros(self.shapes.moments), zeros(own))

    # A layer's turn.

    def prefetch(self, layer: int, active: Int[np.ndarray, "n"] | None = None) -> None:
        """Starts to bring `active` of `layer` (unset: those of its last update) to a slab, unless
        there is no such layer."""
        if 0 <= layer < self.sizes.layers:
            self._start(layer, self.last[layer] if active is None else active)

    def need(self, layer: int, active: Int[np.ndarray, "n"]) -> Matrices:
        """The slab of `layer` with at least `active`, once it is there."""
        begin = perf_counter()
        slab = self._start(layer, active)
        assert slab.job is not None
        slab.job.result()
        self._used.waited += perf_counter() - begin
        return slab.matrices

    def put_gradient(self, layer: int, active: Int[np.ndarray, "n"], gradients: Matrices) -> None:
        """Keeps the gradients, [E, …], of the experts that were active, until `end_update` says
        what they are worth."""
        held, experts = self._residents[layer], self.sizes.experts
        self.made[layer, active] = -1
        if len(held.ids):
            held.gradients = self._programs.take(gradients, held.ids)
        cold = np.setdiff1d(active, held.ids)
        assert len(gradients[0]) == experts

        def write() -> None:
            parts = [np.asarray(g) for g in gradients]
            views = as_parts(parts)
            for run in _runs(cold):
                at = slice(run[0], run[-1] + 1)
                self.shelf.write("gradients", layer, run, [view[at] for view in views])

        self._gradients.append(self._submit_write(layer, write))
        begin = perf_counter()
        while len(self._gradients) > 1:
            self._gradients.popleft().result()
        self._used.waited += perf_counter() - begin

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

            slab.job = self._mover.submit(job)
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

    # In the mover's thread.

    def _fill(self, slab: Slab, layer: int, ids: np.ndarray) -> None:
        held = self._residents[layer]
        self._advance_residents(layer)
        cold = np.setdiff1d(ids, held.ids)
        if len(cold) < len(ids):  # residents, then: they come together
            self._place(slab, held.ids, held.parameters)
        for rows, parameters in self._up_to_date(layer, cold):
            self._place(slab, _padded(rows, self.sizes.chunk), parameters, len(rows))
        jax.block_until_ready(slab.matrices)

    def _place(self, slab: Slab, ids: np.ndarray, rows: Matrices, count: int | None = None) -> None:
        places, number = ids.astype(np.int32), len(ids) if count is None else count
        slab.matrices = self._programs.place(slab.matrices, rows, places, np.int32(number))

    def _advance_residents(self, layer: int) -> None:
        held = self._residents[layer]
        due = self._due(layer, held.ids)
        if len(held.ids) and np.any(due.stop > due.start):
            held.parameters, held.moments = self._programs.advance_in_place(
                held.parameters, held.moments, held.gradients, due
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

        reading = [self._reader.submit(read, *chunk) for chunk in chunks[:1]]
        for index, (rows, late) in enumerate(chunks):
            found = reading.pop().result()
            reading += [self._reader.submit(read, *c) for c in chunks[index + 1 : index + 2]]
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
        return Due(*(_padded(part, max(size, len(ids))) for part in found))

    def _mark(self, layer: int, ids: np.ndarray) -> None:
        self.made[layer, ids], self.upto[layer, ids] = -1, self.updates

    def _chunks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        for begin in range(0, len(ids), self.sizes.chunk):
            yield ids[begin : begin + self.sizes.chunk]

    def _read_from(self, shelf: Shelf, kind: str, layer: int, rows: np.ndarray) -> list[np.ndarray]:
        """The rows, padded to a chunk, in memory of their own: JAX may keep it as it is."""
        shapes = self.shapes.moments if kind == "moments" else self.shapes.parameters
        arrays = [np.empty((self.sizes.chunk, *s.shape), s.dtype) for s in shapes]
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

        self._outstanding.append(self._submit_write(layer, write))
        while len(self._outstanding) > 4:
            self._outstanding.popleft().result()

    def _submit_write(self, layer: int, write: Callable[[], None]) -> "Future[None]":
        future = self._writer.submit(write)
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
        leave = ~np.isin(held.ids, ids)
        for kind in ("parameters", "moments", "gradients"):
            rows = [np.asarray(part) for part in getattr(held, kind)]
            new = [np.empty_like(part) for part in rows]
            for part, old in zip(new, rows, strict=True):
                part[np.isin(ids, held.ids)] = old[~leave]
            enter = np.flatnonzero(~np.isin(ids, held.ids))
            for places in self._chunks(enter):
                found = self._read_from(self.shelf, kind, layer, ids[places])
                for part, arrived in zip(new, found, strict=True):
                    part[places] = arrived[: len(places)]
            self._write(kind, layer, held.ids[leave], [part[leave] for part in rows])
            setattr(held, kind, tuple(jnp.asarray(part) for part in new))
        held.ids = ids

    def _into_residents(self, kind: str, layer: int, rows: np.ndarray, arrays: list[Any]) -> None:
        held = self._residents[layer]
        if len(rows):
            places = np.searchsorted(held.ids, rows)
            parts = zip(getattr(held, kind), arrays, strict=True)
            setattr(held, kind, tuple(part.at[places].set(array) for part, array in parts))

    # Checkpoints and reports.

    def save(self, folder: Path) -> None:
        """Brings everything up to date and copies it, a chunk at a time, to a shelf in `folder`."""
        self.drain()
        kinds = {kind: self.shelf.kinds[kind] for kind in ("parameters", "moments")}
        saved = Shelf(folder, self.sizes.layers, self.sizes.experts, kinds)
        try:
            for layer in range(self.sizes.layers):
                self._mover.submit(self._save_layer, saved, layer).result()
            saved.finish()
        finally:
            saved.close()

    def _save_layer(self, saved: Shelf, layer: int) -> None:
        self._advance_residents(layer)
        held = self._residents[layer]
        for kind in ("parameters", "moments"):
            if len(held.ids):
                rows = [np.asarray(part) for part in getattr(held, kind)]
                saved.write(kind, layer, held.ids, as_parts(rows))
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
        self._used = Uses(start=now)
        moved = {f"{kind}_bytes": now[kind] - used.start.get(kind, 0) for kind in now}
        return {
            **moved,
            "expert_hit_rate": float(used.hits / used.uses) if used.uses else 1.0,
            "expert_wait_seconds": used.waited,
            "device_expert_bytes": self.sizes.device,
        }

    def close(self) -> None:
        """Ends the threads and removes the shelf: checkpoints hold what is worth keeping."""
        for pool in (self._mover, self._reader, self._writer):
            pool.shutdown(cancel_futures=True)
        self.shelf.close()
        self.shelf.remove()


class Programs:
    """The jitted functions on rows."""

    def __init__(self, config: TrainConfig) -> None:
        advance = make_advance(config)
        self.advance = jax.jit(advance)
        self.advance_in_place = jax.jit(advance, donate_argnums=(0, 1))
        self.take = jax.jit(lambda rows, ids: tuple(part[ids] for part in rows))
        self.place = jax.jit(_place, donate_argnums=0)


@lru_cache(maxsize=4)
def _programs(config: TrainConfig) -> Programs:
    return Programs(config)


def _place(
    slab: Matrices, rows: Matrices, places: Int[Array, "n"], count: Int[Array, ""]
) -> Matrices:
    """slab[places[i]] = rows[i] for i < count."""

    def body(i: Array, slab: Matrices) -> Matrices:
        pairs = zip(slab, rows, strict=True)
        return tuple(lax.dynamic_update_index_in_dim(s, r[i], places[i], 0) for s, r in pairs)

    return lax.fori_loop(0, count, body, slab)


def _runs(ids: np.ndarray) -> list[np.ndarray]:
    """`ids` (ascending) split where they are not adjacent."""
    return np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []


def _padded(part: np.ndarray, size: int) -> np.ndarray:
    """`part` and zeros: nothing is due in them."""
    return np.concatenate([part, np.zeros(size - len(part), part.dtype)])
