"""The experts of every layer in three tiers: device, host memory, disk.

A step asks for a layer's experts with `fetch`. Residents are there. Background threads bring the
others, while the caller and the device work on. The parts:

- residency: who is served how, and who stays;
- tiers: where every expert is;
- transfers: the threads that read and copy;
- memory: the places that they read and copy to;
- delivery: the experts of one fetch;
- lease: the right to compute with a fetched expert;
- traffic: counters.
"""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Float, Int

from moe_jax.config import OnMiss, require
from moe_jax.placement.delivery import Delivery
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.lease import Lease
from moe_jax.placement.memory import (
    Expert,
    Memory,
    break_even_rows,
    device_memory,
    host_memory,
)
from moe_jax.placement.place import Scope
from moe_jax.placement.policy import Policy
from moe_jax.placement.residency import Residency, Source, check_working_set, divide_budget
from moe_jax.placement.threads import OwnerThread
from moe_jax.placement.tiers import Tiers
from moe_jax.placement.traffic import Traffic, TrafficMeter
from moe_jax.placement.transfers import READERS, Transfers

__all__ = ["READERS", "Expert", "ExpertStore", "Lease"]


class ExpertStore:
    """Holds at most `device_bytes` of experts on the device, of which a step needs `working_set`.

    The budget covers the residents, a place for an expert that is used and not kept, and
    `look_ahead` experts fetched for the next layer (fewer where the budget is small). If a layer
    misses more experts than there are free places, the residents with the lowest score are evicted.
    A fixed policy never evicts, so `working_set` places are reserved for misses. What leaves the
    device goes to host memory while `host_bytes` allow it. The longest unused there is dropped,
    because the disk has all. A budget for all experts holds them all, and needs no place beside
    them. `blocking` waits for every copy before anything else happens: the control of the
    asynchronous one.

    `low_bit`: 8-bit copies of the same experts (write_experts). They stand in, for one use, for
    absent experts whose share of every token's weight is below `low_bit_share`. This changes
    results. Nothing else does, except that a computation in host memory beside an accelerator is
    rounded as the CPU rounds. `device`: the first one, unless another is given.

    Use it as a context, from one thread (AssertionError). `fetch` returns leases, which the next
    `fetch` ends. UserError: a budget below one layer's working set, or experts that cannot be read.
    """

    # Every option is a keyword and a setting of its own: a config class would repeat them.
    def __init__(  # noqa: PLR0913
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
        require(host_bytes >= 0, f"placement.host_budget is {host_bytes}: it must not be negative")
        require(on_miss in get_args(OnMiss), f"unknown on_miss '{on_miss}': use {get_args(OnMiss)}")
        size = files.expert_bytes
        working_set = min(working_set, files.experts)
        check_working_set(device_bytes, size, working_set)
        room = divide_budget(
            device_bytes // size,
            working_set,
            look_ahead,
            experts=files.experts,
            layers=files.layers,
            fixed=policy.fixed,
        )
        host_room = min(host_bytes // size, files.layers * files.experts)
        self.files = files
        self.low_bit = low_bit
        self.working_set = working_set
        self.host_budget = host_bytes
        self.device = device or jax.local_devices()[0]
        self.unified = self.device.platform == "cpu"
        """Whether the device computes with host memory, too."""
        above = device_memory(files, room.slots, self.device)
        # Copies down that are under way may find their places given to later ones.
        spare = max(READERS, 2 * (working_set + room.look_ahead)) if host_room else 0
        below = host_memory(files, host_room + spare, self.device, on_miss != "copy")
        self.residency = Residency(
            policy,
            files.layers,
            files.experts,
            room,
            scope=scope,
            recall_floor=recall_floor,
            compute_rows=self._compute_rows(on_miss, above, below) if host_room else np.inf,
            low_bit_share=low_bit_share if low_bit else 0.0,
        )
        self._meter = TrafficMeter()
        self._transfers = Transfers(
            files, low_bit, above, below, meter=self._meter, blocking=blocking
        )
        self.tiers = Tiers(self._transfers, host_room, compute_in_host=on_miss != "copy")
        self._last: Delivery | None = None
        """The last fetch's experts."""
        self._owner = OwnerThread("the store of experts")

    def _compute_rows(self, on_miss: OnMiss, above: Memory, below: Memory) -> float:
        """Tokens up to which an expert in host memory is computed with there."""
        if on_miss == "copy":
            return 0.0
        if on_miss == "compute" or self.unified:
            return np.inf  # unified: the same processor either way, so the copy saves nothing
        return break_even_rows(self.files, above, below)

    def __enter__(self) -> "ExpertStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_leases()
        self.tiers.release()  # a copy down may wait for one of these places
        self._transfers.close()

    @property
    def traffic(self) -> Traffic:
        """What was done since the store was created or `reset`."""
        return self._meter.traffic

    def reset(self) -> None:
        """Counts traffic from zero. Residents and policy stay."""
        self._owner.check()
        self._meter.reset()

    def fill(self) -> None:
        """Brings the experts of the highest scores to the device, and the next ones to host memory.

        Without it they come by use.
        """
        self._owner.check()
        for e in self.residency.placement.fill():
            self.tiers.resident[e] = self.tiers.bring(e)
        others = self.residency.best_absent(self.tiers.resident, self.tiers.host_room)
        for e in reversed(others):  # the first there is the first to be dropped
            self.tiers.host[e] = self._transfers.read_to_host(e)
        for loading in (*self.tiers.resident.values(), *self.tiers.host.values()):
            loading.result()
        self._measure_peak(0)

    def fetch(
        self,
        layer: int,
        experts: Int[np.ndarray, "n"],
        following: Sequence[int] | None = None,
        *,
        rows: Int[np.ndarray, "n"] | None = None,
        share: Float[np.ndarray, "n"] | None = None,
        arrived: Callable[[int, Lease], None] = lambda index, lease: None,
    ) -> list[Lease]:
        """Leases on these distinct experts of `layer`, in their order.

        `arrived` is called with each one's position and lease when it is there, before others are
        waited for.

        `following`: experts that layer + 1 will probably need, most probable first. They are asked
        for when this layer's are there, and come while it computes. `rows`: how many tokens each
        expert has (1 without it), and `share` the largest share of a token's weight (1 without it).
        """
        self._owner.check()
        entered = self._meter.now()
        self.settle()
        self._end_leases()
        self.tiers.release()
        ids = [layer * self.files.experts + int(e) for e in experts]
        require(
            len(ids) <= self.working_set,
            f"{len(ids)} experts of one layer are needed together, the store is made for a "
            f"working set of {self.working_set}: make it for the whole batch",
        )
        self.residency.ahead.compare(layer, ids)
        predicted, wasted = self.tiers.take_arriving(set(ids))
        self.traffic.wasted_bytes += wasted * self.files.expert_bytes
        sources = self.residency.classify(
            ids, self.tiers.resident, predicted, self.tiers.host, rows=rows, share=share
        )
        self._make_room(layer, ids, sources)
        self._last = Delivery(self.tiers, layer, np.asarray(experts), predicted)
        begin = self._meter.now()
        leases = self._last.bring(sources, lambda e, lease: arrived(ids.index(e), lease))
        self.traffic.waited += self._meter.now() - begin
        if following is not None:  # not before: what is needed now would have to share the disk
            self._prefetch(layer + 1, following)
        self._count(self._last, sources)
        self._meter.fetched(entered)
        return [leases[e] for e in ids]

    def settle(self) -> None:
        """Decides who of the last fetch stays on the device, and where the others go.

        The next fetch does it first. Called while the device works on what was fetched, it costs
        no time.
        """
        self._owner.check()
        last = self._last
        if last is None or last.settled:
            return
        last.settled = True
        passing = last.passing
        for e in passing.keys() & self.tiers.host.keys():
            self.tiers.leave_host(e, after=passing[e])
        change = self.residency.settle(last.layer, last.experts, last.low_bit)
        for e in change.admitted:
            self.tiers.resident[e] = passing.pop(e) if e in passing else self.tiers.promote(e)
        for e in change.evicted:
            self.tiers.demote(e, self.tiers.resident.pop(e))
        for e, loading in passing.items():
            self.tiers.demote(e, loading)
        for loading in last.low_bit.values():
            self.tiers.leave_device(loading)

    def _make_room(self, layer: int, ids: list[int], sources: dict[int, Source]) -> None:
        evicted = self.residency.evict(layer, ids, self.tiers.resident)
        # What is needed must not leave host memory for those who come there now.
        wanted = [e for e in ids if e in self.tiers.host and (evicted or sources[e] == "host")]
        self.tiers.make_room(evicted, wanted)

    def _prefetch(self, layer: int, experts: Sequence[int]) -> None:
        ids = [layer * self.files.experts + e for e in experts]
        ahead = self.residency.ahead
        ahead.predict(layer, ids)
        if ahead.active:
            self.tiers.prefetch(ids, ahead.experts)

    def _count(self, delivery: Delivery, sources: dict[int, Source]) -> None:
        served = list(sources.values())
        self.traffic.uses += len(served)
        self.traffic.hits += served.count("resident")
        self.traffic.ahead += served.count("predicted")
        self.traffic.computed += served.count("host")
        self.traffic.low_bit += served.count("low_bit")
        self._measure_peak(len(delivery.passing) + len(delivery.low_bit))

    def _measure_peak(self, passing: int) -> None:
        experts = len(self.tiers.resident) + passing + len(self.tiers.arriving)
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, experts * self.files.expert_bytes)

    def _end_leases(self) -> None:
        if self._last is not None:
            self._last.end_leases()
            self._last = None
