"""Where every expert is: on the device, on its way there, in host memory, or on disk alone."""

from collections import OrderedDict
from concurrent.futures import Future

from moe_jax.placement.memory import Memory
from moe_jax.placement.transfers import Loading, Transfers, failed


class Tiers:
    """The store's map from experts, numbered layer · E + expert, to transfers begun or done.

    An expert is in one of the two memory tiers, never in both. Only the store's thread uses it.
    """

    def __init__(self, transfers: Transfers, host_room: int, compute_in_host: bool) -> None:
        self.resident: dict[int, Loading] = {}
        self.arriving: dict[int, Loading] = {}
        """On a prediction for the next layer."""
        self.host: OrderedDict[int, Loading] = OrderedDict()
        """The longest unused first."""
        self.host_room = host_room
        """Experts that host memory holds."""
        self.compute_in_host = compute_in_host
        self._transfers = transfers
        self._leaving: list[tuple[Memory, Loading, Future]] = []

    def bring(self, expert: int, *, ahead: bool = False, here: bool = False) -> Loading:
        """Starts to bring an expert to the device, from host memory if it is there, by another
        thread or `here` and now."""
        if expert in self.host:
            source = self.host[expert]
            return self._transfers.copy_to_device(expert, source, ahead=ahead, here=here)
        return self._transfers.read_to_device(expert, ahead=ahead, here=here)

    def bring_low_bit(self, expert: int) -> Loading:
        """Starts to bring an expert's 8-bit copy to the device."""
        return self._transfers.read_low_bit_to_device(expert)

    def prefetch(self, experts: list[int], limit: int) -> None:
        """Starts to bring at most `limit` of `experts`, those that cannot be computed with where
        they are."""
        near = self.resident.keys()
        if self.compute_in_host:
            near = near | self.host.keys()
        absent = [expert for expert in experts if expert not in near][:limit]
        self.arriving = {expert: self.bring(expert, ahead=True) for expert in absent}

    def take_arriving(self, needed: set[int]) -> tuple[dict[int, Loading], int]:
        """(the arriving experts that are needed, how many others came for nothing and leave)"""
        arriving = self.arriving
        wasted = 0
        for expert in arriving.keys() - needed:
            loading = arriving[expert]
            if loading.cancel() or failed(loading):
                continue
            wasted += 1
            if expert in self.host:
                self.leave_device(loading)
            else:
                self.demote(expert, loading)
        self.release()
        self.arriving = {}
        return {e: loading for e, loading in arriving.items() if e in needed}, wasted

    def make_room(self, evicted: list[int], wanted: list[int]) -> None:
        """Residents leave the device, for host memory where `wanted` experts leave room there."""
        for expert in wanted:
            self.host.move_to_end(expert)
        for count, expert in enumerate(evicted):
            loading = self.resident.pop(expert)
            if count < self.host_room - len(wanted):
                self.demote(expert, loading)
            else:
                self.leave_device(loading)
        self.release()

    def promote(self, expert: int) -> Loading:
        """To the device from host memory, where it was computed with."""
        below = self.host.pop(expert)
        above = self._transfers.copy_to_device(expert, below)
        self._leave(self._transfers.host, below, above)
        return above

    def demote(self, expert: int, loading: Loading) -> None:
        """From the device to host memory, if there is any. The longest unused there is dropped."""
        if not self.host_room:
            self.leave_device(loading)
            return
        if expert in self.host:
            self._leave(self._transfers.host, self.host.pop(expert))
        while len(self.host) >= self.host_room:
            oldest, below = self.host.popitem(last=False)
            # It may be the source of a copy that is on its way to the device.
            self._leave(self._transfers.host, below, self.arriving.get(oldest))
        below = self._transfers.copy_to_host(loading)
        self.host[expert] = below
        self.leave_device(loading, below)

    def leave_device(self, loading: Loading, after: Future | None = None) -> None:
        """Gives up a place on the device, once the copy `after` of it is done."""
        self._leave(self._transfers.device, loading, after)

    def leave_host(self, expert: int, after: Loading) -> None:
        """Gives up an expert's place in host memory, once its copy `after` has come up."""
        self._leave(self._transfers.host, self.host.pop(expert), after)

    def release(self) -> None:
        """Takes back the memory of all that left. Nothing may compute with it any more."""
        leaving = self._leaving
        self._leaving = []
        for memory, loading, after in leaving:
            _release(memory, loading, after)

    def _leave(self, memory: Memory, loading: Loading, after: Future | None = None) -> None:
        after = after or loading
        if memory is self._transfers.host and not self.compute_in_host:
            _release(memory, loading, after)  # nothing ever computes there
        else:
            self._leaving.append((memory, loading, after))


def _release(memory: Memory, loading: Loading, after: Future) -> None:
    def release(_: Future) -> None:
        if not loading.cancelled() and loading.exception() is None:
            memory.release(loading.result())

    after.add_done_callback(release)
