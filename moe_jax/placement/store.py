"""The experts of every layer in three tiers: device, host memory, disk.

A step asks for a layer's experts with `fetch`. Residents are there; the others are brought by
background threads, which the caller's own work and the device's overlap with. An expert is in one
of the two memory tiers, never in both. The caller's thread alone decides who is where; the threads
read and copy.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from time import perf_counter
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moe_jax.base.errors import UserError
from moe_jax.config import OnMiss, require
from moe_jax.moe.experts import expert_output
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.memory import Expert, Held, Memory, device_memory, host_memory
from moe_jax.placement.place import Placement, Scope
from moe_jax.placement.policy import Policy
from moe_jax.placement.traffic import Ahead, Copy, Traffic

READERS = 4
"""Threads that read and copy: as many reads as keep a solid-state disk busy."""


Arrived = dict[int, "Future[Held]"]


def _done(call: Callable[..., Held], *arguments: Any) -> "Future[Held]":
    """What the call gives or raises, as if another thread had called it."""
    future: Future[Held] = Future()
    try:
        future.set_result(call(*arguments))
    except UserError as error:
        future.set_exception(error)
    return future


def _failed(future: "Future[Held]") -> bool:
    return future.done() and future.exception() is not None


def _give_back(memory: Memory, future: "Future[Held]", after: Future) -> None:
    def done(_: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            memory.release(future.result())

    after.add_done_callback(done)


class ExpertStore:
    """Holds at most `device_bytes` of experts on the device, of which a step needs `working_set`.

    The budget covers the residents, a place for an expert that is used and not kept, and
    `look_ahead` experts fetched for the next layer (fewer where the budget is small). A layer that
    misses more takes the places of the least worthy residents; under a policy whose residents are
    fixed, those of a whole working set are kept free instead. What leaves the device goes to host
    memory while `host_bytes` allow it (the oldest there is dropped; the disk has all). A budget for
    all experts holds them all, and needs no place beside them. `blocking` waits for every copy
    before anything else happens: the control of the asynchronous one.

    `low_bit`: 8-bit copies of the same experts (write_experts), which then stand in, for once, for
    absent experts whose share of every token's weight is below `low_bit_share`. This changes
    results. Nothing else does, but that what is computed in host memory beside an accelerator is
    rounded as the CPU rounds. `device`: the first one, unless another is given.

    Use it as a context, from one thread. What `fetch` returned is overwritten after the next
    `fetch`: by then, nothing may be computing with it.

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
        on_miss: OnMiss = "copy",
        low_bit: ExpertFiles | None = None,
        low_bit_share: float = 0.5,
        device: Any = None,
    ) -> None:
        self.files, self.blocking, self.host_budget = files, blocking, host_bytes
        size, working_set = files.expert_bytes, min(working_set, files.experts)
        slots = device_bytes // size
        require(
            slots >= working_set,
            f"placement.device_budget of {device_bytes} bytes is below one layer's working set: "
            f"{working_set} experts of {size} bytes need at least {working_set * size}",
        )
        self.working_set = working_set
        require(host_bytes >= 0, f"placement.host_budget is {host_bytes}: it must not be negative")
        require(on_miss in get_args(OnMiss), f"unknown on_miss '{on_miss}': use {get_args(OnMiss)}")
        everything = files.layers * files.experts
        look_ahead = min(look_ahead, slots - working_set, files.experts)
        capacity = slots - look_ahead - (working_set if policy.fixed else 1)
        if slots >= everything:
            look_ahead, capacity = 0, everything
        self.ahead = Ahead(look_ahead, recall_floor)
        self.placement = Placement(policy, files.layers, files.experts, capacity, scope)
        self.traffic, self._born = Traffic(), perf_counter()
        self.device = device or jax.local_devices()[0]
        self.unified = self.device.platform == "cpu"
        """Whether the device computes with host memory, too."""
        self._room_below = min(host_bytes // size, everything)
        self._places = min(slots, everything)
        self._above = device_memory(files, self._places, self.device)
        # Copies down that are under way may find their places given to later ones.
        spare = max(READERS, 2 * (working_set + look_ahead))
        below = self._room_below + (spare if self._room_below else 0)
        self._host = host_memory(files, below, self.device, on_miss != "copy")
        self._resident: dict[int, Future[Held]] = {}
        self._arriving: dict[int, Future[Held]] = {}
        self._below: OrderedDict[int, Future[Held]] = OrderedDict()
        self._leaving: list[tuple[Memory, Future[Held], Future]] = []
        self._unsettled: tuple[int, np.ndarray, Arrived, Arrived] | None = None
        self._worker = ThreadPoolExecutor(1 if blocking else READERS, "experts")
        self._downward = ThreadPoolExecutor(1, "experts-down")
        self._counting = Lock()
        self.on_miss, self.low_bit, self._low_bit_share = on_miss, low_bit, low_bit_share
        self._compute_rows = {"copy": lambda: 0.0, "compute": lambda: np.inf}.get(
            on_miss, self._measure_compute
        )()

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._release()  # a copy down may wait for one of these places
        self._worker.shutdown(cancel_futures=True)
        self._downward.shutdown(cancel_futures=True)

    def fill(self) -> None:
        """Brings the experts that the policy thinks most of, and into host memory the next ones;
        without it they come by use."""
        wanted = self.placement.fill()
        for e in wanted:
            self._resident[e] = self._ask(e, False)
        everything = np.arange(self.placement.policy.size)
        by_worth = np.argsort(-self.placement.policy.worth(everything), kind="stable").tolist()
        others = [e for e in by_worth if e not in self._resident][: self._room_below]
        for e in reversed(others):  # the least worthy leaves first
            self._below[e] = self._submit(self._read, self._host, e, self.files, False)
        for future in (*self._resident.values(), *self._below.values()):
            future.result()
        self._measure(0)

    def reset(self) -> None:
        """Counts traffic from zero; residents and policy stay."""
        self.traffic, self._born = Traffic(), perf_counter()

    def fetch(
        self,
        layer: int,
        experts: Int[np.ndarray, "n"],
        following: Sequence[int] | None = None,
        *,
        rows: Int[np.ndarray, "n"] | None = None,
        share: Float[np.ndarray, "n"] | None = None,
        arrived: Callable[[int, Expert], None] = lambda index, matrices: None,
    ) -> list[Expert]:
        """The matrices of these distinct experts of `layer`, in their order. `arrived` is called
        with each one's position and matrices when it is there: before others are waited for.

        `following`: experts that layer + 1 will probably need, most probable first; they are asked
        for when this layer's are there, and come while it computes. `rows`: how many tokens each
        expert has (1 without it), and `share` the largest share of a token's weight (1 without it).
        """
        entered = perf_counter()
        self.settle()
        self._release()
        ids = [layer * self.files.experts + int(e) for e in experts]
        require(
            len(ids) <= self.working_set,
            f"{len(ids)} experts of one layer are needed together, the store is made for a "
            f"working set of {self.working_set}: make it for the whole batch",
        )
        self.ahead.compare(layer, ids)
        predicted = self._drop_wrong(set(ids))
        found, missing, light = self._look_up(ids, predicted, rows, share)
        came, low = dict(predicted), {}
        self._make_room(layer, ids)
        begin = perf_counter()
        for e in light:
            found[e] = low[e] = self._submit(self._read, self._above, e, self.low_bit, False)
        for e in missing[:-1]:
            found[e] = came[e] = self._ask(e, False)
        given: dict[int, Expert] = {}

        def give(e: int, future: Future[Held]) -> None:
            given[e] = future.result().matrices
            arrived(ids.index(e), given[e])

        there = [e for e in found if found[e].done()]
        self._wait({e: found.pop(e) for e in there}, came | low, give)
        for e in missing[-1:]:  # by this thread, which has nothing else to do
            found[e] = came[e] = self._ask(e, False, here=True)
        self._wait(found, came | low, give)
        self.traffic.waited += perf_counter() - begin
        if following is not None:  # not before: what is needed now would have to share the disk
            self._ask_ahead(layer + 1, following)
        self.traffic.uses += len(ids)
        self.traffic.hits += sum(e in self._resident for e in ids)
        self.traffic.ahead += len(predicted)
        self.traffic.low_bit += len(low)
        self._measure(len(came) + len(low))
        self._unsettled = layer, np.asarray(experts), came, low
        self.traffic.fetches.append((entered - self._born, perf_counter() - self._born))
        return [given[e] for e in ids]

    def _look_up(
        self, ids: list[int], predicted: Arrived, rows: np.ndarray | None, share: np.ndarray | None
    ) -> tuple[Arrived, list[int], list[int]]:
        """(where experts are or will be; who must be brought; whose 8-bit copy stands in)"""
        found: Arrived = {}
        missing, light = [], []
        for index, e in enumerate(ids):
            if e in self._resident:
                found[e] = self._resident[e]
            elif e in predicted:
                found[e] = predicted[e]
            elif e in self._below and (1 if rows is None else rows[index]) <= self._compute_rows:
                found[e] = self._below[e]
                self._below.move_to_end(e)
                self.traffic.computed += 1
            elif share is not None and self.low_bit and share[index] < self._low_bit_share:
                light.append(e)
            else:
                missing.append(e)
        return found, missing, light

    def _make_room(self, layer: int, needed: list[int]) -> None:
        """Before a layer's experts come: places for all of them, and for those of the next layer
        that will be asked for. (One that is computed in host memory may be raised in `settle`.)"""
        short = len(self._resident.keys() | needed) - (self._places - self.ahead.experts)
        if short <= 0:
            return
        wanted = self._below.keys() & needed
        for e in wanted:  # nor do they leave host memory for those who come there now
            self._below.move_to_end(e)
        for count, e in enumerate(self.placement.make_room(layer, short, needed)):
            future = self._resident.pop(e)
            if count < self._room_below - len(wanted):
                self._retire(e, future)
            else:
                self._leave(self._above, future)
        self._release()

    def _wait(
        self,
        found: dict[int, Future[Held]],
        passing: dict[int, Future[Held]],
        give: Callable[[int, Future[Held]], None],
    ) -> None:
        """Gives what was found, each when it is there; after an error, keeps nothing that came."""
        try:
            for e, future in found.items():
                give(e, future)
        except BaseException:
            for future in passing.values():
                self._leave(self._above, future)
            for e in [e for e in found if e in self._below and _failed(self._below[e])]:
                del self._below[e]
            raise

    def settle(self) -> None:
        """Decides who of the last fetch stays on the device, and where the others go. The next
        fetch does it first; called when the work on the fetched is under way, it costs nothing."""
        if self._unsettled is None:
            return
        (layer, experts, came, low), self._unsettled = self._unsettled, None
        for e in came.keys() & self._below.keys():
            self._leave(self._host, self._below.pop(e), came[e])
        change = self.placement.use(layer, experts, barred=low)
        for e in change.admitted:
            self._resident[e] = came.pop(e) if e in came else self._raise(e)
        for e in change.evicted:
            self._retire(e, self._resident.pop(e))
        for e, future in came.items():
            self._retire(e, future)
        for future in low.values():
            self._leave(self._above, future)

    def _raise(self, expert: int) -> "Future[Held]":
        """To the device from host memory, where it was computed with."""
        below = self._below.pop(expert)
        above = self._submit(self._copy, self._above, expert, below, False)
        self._leave(self._host, below, above)
        return above

    def _retire(self, expert: int, future: "Future[Held]") -> None:
        """From the device, to host memory where there is any."""
        if not self._room_below:
            self._leave(self._above, future)
            return
        if expert in self._below:
            self._leave(self._host, self._below.pop(expert))
        while len(self._below) >= self._room_below:
            oldest, place = self._below.popitem(last=False)
            self._leave(self._host, place, self._arriving.get(oldest))
        self._below[expert] = below = self._copy_down(future)
        self._leave(self._above, future, below)

    def _copy_down(self, future: "Future[Held]") -> "Future[Held]":
        """By a thread that does nothing else, and not before the expert has come: the places that
        this frees are what those who bring experts may be waiting for."""
        below: Future[Held] = Future()

        def run() -> None:
            try:
                below.set_result(self._host.copy(future.result()))
            except Exception as error:  # noqa: BLE001 (or whoever waits for it waits for ever)
                below.set_exception(error)

        future.add_done_callback(lambda _: self._downward.submit(run))
        return below

    def _leave(self, memory: Memory, future: "Future[Held]", after: Future | None = None) -> None:
        """An expert's place is free once `after`, a copy of it to elsewhere, is done, and once
        nothing computes with it: at the next fetch."""
        leaving = memory, future, after or future
        if memory is self._host and self.on_miss == "copy":  # nothing ever computes there
            _give_back(*leaving)
        else:
            self._leaving.append(leaving)

    def _release(self) -> None:
        leaving, self._leaving = self._leaving, []
        for place in leaving:
            _give_back(*place)

    def _ask_ahead(self, layer: int, experts: Sequence[int]) -> None:
        ids = [layer * self.files.experts + e for e in experts]
        self.ahead.predict(layer, ids)
        if self.ahead.active:
            there = self._resident.keys()
            if self.on_miss != "copy":
                there = there | self._below.keys()
            absent = [e for e in ids if e not in there][: self.ahead.experts]
            self._arriving = {e: self._ask(e, True) for e in absent}

    def _drop_wrong(self, needed: set[int]) -> dict[int, "Future[Held]"]:
        """The arriving experts that are needed; the others leave again."""
        for e in self._arriving.keys() - needed:
            future = self._arriving[e]
            if future.cancel() or _failed(future):
                continue
            self.traffic.wasted_bytes += self.files.expert_bytes
            if e in self._below:
                self._leave(self._above, future)
            else:
                self._retire(e, future)
        self._release()
        arriving, self._arriving = self._arriving, {}
        return {e: future for e, future in arriving.items() if e in needed}

    def _submit(
        self, call: Callable[..., Held], *arguments: Any, here: bool = False
    ) -> "Future[Held]":
        if here:
            return _done(call, *arguments)
        future = self._worker.submit(call, *arguments)
        if self.blocking:
            wait([future])
        return future

    def _ask(self, expert: int, ahead: bool, here: bool = False) -> "Future[Held]":
        """Has the expert brought to the device, from host memory if it is there, by another thread
        or `here` and now."""
        if expert in self._below:
            below = self._below[expert]
            return self._submit(self._copy, self._above, expert, below, ahead, here=here)
        return self._submit(self._read, self._above, expert, self.files, ahead, here=here)

    def _read(self, memory: Memory, expert: int, files: ExpertFiles, ahead: bool) -> Held:
        """In a thread: from the disk."""
        begin = perf_counter()
        held = memory.read(*divmod(expert, files.experts), files)
        self._count(expert, begin, ahead, disk=files.expert_bytes)
        return held

    def _copy(self, memory: Memory, expert: int, below: "Future[Held]", ahead: bool) -> Held:
        """In a thread: from host memory."""
        source = below.result()  # being copied down at this moment, perhaps
        begin = perf_counter()
        held = memory.copy(source)
        self._count(expert, begin, ahead, host=self.files.expert_bytes)
        return held

    def _count(
        self, expert: int, begin: float, ahead: bool, *, disk: int = 0, host: int = 0
    ) -> None:
        copy = Copy(expert, begin - self._born, perf_counter() - self._born, ahead)
        with self._counting:
            self.traffic.disk_bytes += disk
            self.traffic.host_bytes += host
            self.traffic.copies.append(copy)

    def _measure(self, transit: int) -> None:
        held = len(self._resident) + transit + len(self._arriving)
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, held * self.files.expert_bytes)

    def _measure_compute(self) -> float:
        """Tokens of one expert up to which computing in host memory beats a copy to the device."""
        if self.unified or not self._room_below:
            return np.inf  # the same processor either way, so the copy saves nothing
        below = self._host.read(0, 0, self.files)
        above = self._above.copy(below)
        seconds = []
        compute = jax.jit(expert_output)
        x = jax.device_put(jnp.ones((1, self.files.gate_up_shape[0]), self.files.dtype),
                           below.matrices[0].sharding)  # fmt: skip
        for call in (lambda: compute(x, *below.matrices), lambda: self._above.copy(below).matrices):
            jax.block_until_ready(call())
            begin = perf_counter()
            for _ in range(3):
                jax.block_until_ready(call())
            seconds.append((perf_counter() - begin) / 3)
        for memory, held in ((self._host, below), (self._above, above)):
            memory.release(held)
        return seconds[1] / seconds[0]
