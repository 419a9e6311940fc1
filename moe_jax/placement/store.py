"""The experts of every layer in three tiers: device, pinned host memory, disk.

A step asks for a layer's experts with `fetch`. Residents are there; the others are brought by
background threads, which the caller's own work and the device's overlap with. An expert is in one
of the two memory tiers, never in both.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int

from moe_jax.config import require
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.place import Placement, Scope
from moe_jax.placement.policy import Policy

Expert = tuple[Array, Array]
"""(gate_up [D, 2F], down [F, D]) on the device."""


class Copy(NamedTuple):
    """One expert brought to the device, in seconds since the store was made."""

    expert: int
    begin: float
    end: float
    ahead: bool
    """Fetched on a prediction."""


@dataclass
class Traffic:
    """What a store has done since it was made or `reset`."""

    uses: int = 0
    hits: int = 0
    """Uses that found their expert resident."""
    ahead: int = 0
    """Uses that were no hits, but whose expert a prediction had asked for."""
    disk_bytes: int = 0
    host_bytes: int = 0
    """Bytes brought to the device from pinned host memory."""
    wasted_bytes: int = 0
    """Of all these, those of predictions that did not come true."""
    waited: float = 0.0
    """Seconds that `fetch` waited for experts."""
    peak_bytes: int = 0
    """Most bytes of experts on the device at once."""
    copies: list[Copy] = field(default_factory=list)
    fetches: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of every `fetch`; between two of them the caller computes."""

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 1.0


class Ahead:
    """Look-ahead that watches itself: below a floor of recall it only watches.

    recall: share of a layer's needed experts that were predicted, averaged over about 50 steps.
    """

    def __init__(self, experts: int, recall_floor: float) -> None:
        self.experts, self.recall_floor, self.recall = experts, recall_floor, 1.0
        self._predicted: tuple[int, set[int]] | None = None

    @property
    def active(self) -> bool:
        return self.experts > 0 and self.recall >= self.recall_floor

    def predict(self, layer: int, experts: list[int]) -> None:
        self._predicted = layer, set(experts)

    def compare(self, layer: int, needed: list[int]) -> None:
        """Learns what `layer` really needed, if its experts were predicted."""
        predicted, self._predicted = self._predicted, None
        if predicted is None or predicted[0] != layer or not needed:
            return
        found = len(predicted[1] & set(needed)) / len(needed)
        self.recall += 0.02 * (found - self.recall)


class ExpertStore:
    """Holds at most `device_bytes` of experts on the device, of which a step needs `working_set`.

    The budget covers the residents, the working set of the layer at work, and `look_ahead` experts
    fetched for the next layer (fewer where the budget is small). What leaves the device goes to
    pinned host memory while `host_bytes` allow it (the oldest there is dropped; the disk has all).
    A budget for all experts holds them all, and needs neither buffer. Two threads read, so that one
    checks what it has while the other's read is under way; with a host tier, whose order of moves
    matters, it is one. `blocking` waits for every copy before anything else happens: the control of
    the asynchronous one. Use it as a context, from one thread.

    UserError: a budget below one layer's working set, or experts that cannot be read.
    """

    def __init__(
        self,
        files: ExpertFiles,
        policy: Policy,
        *,
        device_bytes: int,
        working_set: int,
        host_bytes: int = 0,
        look_ahead: int = 0,
        recall_floor: float = 0.5,
        scope: Scope = "pool",
        blocking: bool = False,
    ) -> None:
        self.files, self.blocking, self.host_budget = files, blocking, host_bytes
        size, working_set = files.expert_bytes, min(working_set, files.experts)
        slots = device_bytes // size
        require(
            slots >= working_set,
            f"placement.device_budget of {device_bytes} bytes is below one layer's working set: "
            f"{working_set} experts of {size} bytes need at least {working_set * size}",
        )
        require(host_bytes >= 0, f"placement.host_budget is {host_bytes}: it must not be negative")
        everything = files.layers * files.experts
        look_ahead = min(look_ahead, slots - working_set, files.experts)
        capacity = slots - working_set - look_ahead
        if slots >= everything:
            look_ahead, capacity = 0, everything
        self.ahead = Ahead(look_ahead, recall_floor)
        self.placement = Placement(policy, files.layers, files.experts, capacity, scope)
        self.traffic, self._born = Traffic(), perf_counter()
        device = jax.local_devices()[0]
        self._on_device = SingleDeviceSharding(device)
        self._on_host = SingleDeviceSharding(device, memory_kind="pinned_host")
        self._resident: dict[int, Expert] = {}
        self._arriving: dict[int, Future[Expert]] = {}
        self._host: OrderedDict[int, Expert] = OrderedDict()  # the worker's alone
        self._worker = ThreadPoolExecutor(1 if host_bytes or blocking else 2, "experts")
        self._counting = Lock()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def fill(self) -> None:
        """Brings the experts that the policy thinks most of; without it residents come by use."""
        wanted = self.placement.fill()
        self._resident = {e: self._worker.submit(self._bring, e, False).result() for e in wanted}
        self._measure(0)

    def reset(self) -> None:
        """Counts traffic from zero; residents and policy stay."""
        self.traffic, self._born = Traffic(), perf_counter()

    def fetch(
        self,
        layer: int,
        experts: Int[np.ndarray, "n"],
        following: Int[np.ndarray, "m"] | None = None,
    ) -> list[Expert]:
        """The matrices of these distinct experts of `layer`, in their order.

        `following`: experts that layer + 1 will probably need, most probable first; they are asked
        for after this layer's, and come while it computes.
        """
        entered = perf_counter()
        ids = [layer * self.files.experts + int(e) for e in experts]
        self.ahead.compare(layer, ids)
        predicted = self._drop_wrong(set(ids))
        missing = [e for e in ids if e not in self._resident]
        asked = {e: predicted.get(e) or self._submit(e, False) for e in missing}
        if following is not None:
            self._ask_ahead(layer + 1, following)
        begin = perf_counter()
        came = {e: future.result() for e, future in asked.items()}
        self.traffic.waited += perf_counter() - begin
        self.traffic.uses += len(ids)
        self.traffic.hits += len(ids) - len(missing)
        self.traffic.ahead += len(predicted)
        self._measure(len(came))
        found = [self._resident[e] if e in self._resident else came[e] for e in ids]
        change = self.placement.use(layer, np.asarray(experts))
        for e in change.evicted:
            self._worker.submit(self._demote, e, self._resident.pop(e))
        self._resident.update({e: came[e] for e in change.admitted})
        for e in came.keys() - set(change.admitted):
            self._worker.submit(self._demote, e, came[e])
        self.traffic.fetches.append((entered - self._born, perf_counter() - self._born))
        return found

    def _ask_ahead(self, layer: int, experts: np.ndarray) -> None:
        ids = [layer * self.files.experts + int(e) for e in experts]
        self.ahead.predict(layer, ids)
        if self.ahead.active:
            absent = [e for e in ids if e not in self._resident][: self.ahead.experts]
            self._arriving = {e: self._submit(e, True) for e in absent}

    def _drop_wrong(self, needed: set[int]) -> dict[int, "Future[Expert]"]:
        """The arriving experts that are needed; forgets the others."""
        arriving, self._arriving = self._arriving, {}
        for e in arriving.keys() - needed:
            if not arriving[e].cancel():
                self.traffic.wasted_bytes += self.files.expert_bytes
                if self.host_budget:
                    self._worker.submit(lambda e=e: self._demote(e, arriving[e].result()))
        return {e: future for e, future in arriving.items() if e in needed}

    def _submit(self, expert: int, ahead: bool) -> "Future[Expert]":
        future = self._worker.submit(self._bring, expert, ahead)
        if self.blocking:
            future.result()
        return future

    def _bring(self, expert: int, ahead: bool) -> Expert:
        """In the worker: from host memory if it is there, else from the disk."""
        begin = perf_counter()
        held, size = self._host.pop(expert, None), self.files.expert_bytes
        if held is not None:
            found = jax.device_put(held, self._on_device)
        else:
            gate_up, down = self.files.read(*divmod(expert, self.files.experts))
            # Copied first: on a CPU device_put may keep the array itself, here the read buffer.
            found = jax.device_put((gate_up.copy(), down.copy()), self._on_device)
        jax.block_until_ready(found)
        end = perf_counter()
        with self._counting:
            self.traffic.disk_bytes += size if held is None else 0
            self.traffic.host_bytes += 0 if held is None else size
            self.traffic.copies.append(Copy(expert, begin - self._born, end - self._born, ahead))
        return found

    def _demote(self, expert: int, matrices: Expert) -> None:
        """In the worker: to host memory, where there is any."""
        room = self.host_budget // self.files.expert_bytes
        if room == 0 or expert in self._host:
            return
        while len(self._host) >= room:
            self._host.popitem(last=False)
        self._host[expert] = jax.block_until_ready(jax.device_put(matrices, self._on_host))

    def _measure(self, transit: int) -> None:
        held = len(self._resident) + transit + len(self._arriving)
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, held * self.files.expert_bytes)
