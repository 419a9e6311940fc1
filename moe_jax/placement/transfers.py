"""Threads that bring experts to the device and take them down to host memory.

`Transfers` belongs to the store's thread and hands out futures. `Mover` has the methods that the
threads run. It knows nothing of who is where, so no bookkeeping can be touched from two threads.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from moe_jax.base.errors import UserError
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.memory import LoadedExpert, Memory
from moe_jax.placement.traffic import TrafficMeter

READERS = 4
"""Threads that read and copy: as many reads as keep a solid-state disk busy."""

Loading = Future[LoadedExpert]


class Mover:
    """Reads and copies experts, in any thread: files, memories and the meter allow that."""

    def __init__(self, files: ExpertFiles, meter: TrafficMeter) -> None:
        self._files = files
        self._meter = meter

    def read(self, memory: Memory, expert: int, files: ExpertFiles, ahead: bool) -> LoadedExpert:
        """From the disk to `memory`."""
        begin = self._meter.now()
        loaded = memory.read(*divmod(expert, files.experts), files)
        self._meter.copied(expert, begin, ahead, disk=files.expert_bytes, host=0)
        return loaded

    def copy_up(self, memory: Memory, expert: int, source: Loading, ahead: bool) -> LoadedExpert:
        """From host memory to `memory`, the device's."""
        below = source.result()  # it may still be on its way down
        begin = self._meter.now()
        loaded = memory.copy(below)
        self._meter.copied(expert, begin, ahead, disk=0, host=self._files.expert_bytes)
        return loaded

    def copy_down(self, host: Memory, source: Loading, below: Loading) -> None:
        """From the device to host memory. `below` gets the result."""
        try:
            below.set_result(host.copy(source.result()))
        except Exception as error:  # noqa: BLE001 (or whoever waits for it waits for ever)
            below.set_exception(error)


class Transfers:
    """Starts transfers between disk, host memory and device.

    `blocking` waits for every transfer to the device before anything else happens: the control of
    the asynchronous ones.
    """

    def __init__(
        self,
        files: ExpertFiles,
        low_bit: ExpertFiles | None,
        device: Memory,
        host: Memory,
        *,
        meter: TrafficMeter,
        blocking: bool,
    ) -> None:
        self._files = files
        self._low_bit = low_bit
        self.device = device
        self.host = host
        self._blocking = blocking
        self._mover = Mover(files, meter)
        self._readers = ThreadPoolExecutor(1 if blocking else READERS, "experts")
        self._downward = ThreadPoolExecutor(1, "experts-down")

    def read_to_device(self, expert: int, *, ahead: bool = False, here: bool = False) -> Loading:
        """From the disk, by a thread or `here` and now."""
        return self._start(here, self._mover.read, self.device, expert, self._files, ahead)

    def read_low_bit_to_device(self, expert: int) -> Loading:
        """The 8-bit copy, from the disk."""
        return self._start(False, self._mover.read, self.device, expert, self._low_bit, False)

    def read_to_host(self, expert: int) -> Loading:
        """From the disk."""
        return self._start(False, self._mover.read, self.host, expert, self._files, False)

    def copy_to_device(
        self, expert: int, source: Loading, *, ahead: bool = False, here: bool = False
    ) -> Loading:
        """From host memory, by a thread or `here` and now."""
        return self._start(here, self._mover.copy_up, self.device, expert, source, ahead)

    def copy_to_host(self, source: Loading) -> Loading:
        """From the device, once the expert has come there."""
        below: Loading = Future()

        def start(_: Loading) -> None:
            # A thread that does nothing else: this copy frees the place that the readers may all
            # be waiting for, so it must never queue behind them.
            self._downward.submit(self._mover.copy_down, self.host, source, below)

        # Not before the expert has come, or the one thread would wait for a read of a later place.
        source.add_done_callback(start)
        return below

    def close(self) -> None:
        """Ends the threads. Transfers that have not begun are dropped."""
        self._readers.shutdown(cancel_futures=True)
        self._downward.shutdown(cancel_futures=True)

    def _start(self, here: bool, call: Callable[..., LoadedExpert], *arguments: Any) -> Loading:
        if here:
            return _done(call, *arguments)
        future = self._readers.submit(call, *arguments)
        if self._blocking:
            wait([future])
        return future


def _done(call: Callable[..., LoadedExpert], *arguments: Any) -> Loading:
    """What the call returns or raises, as if a thread had called it."""
    future: Loading = Future()
    try:
        future.set_result(call(*arguments))
    except UserError as error:
        future.set_exception(error)
    return future


def failed(loading: Loading) -> bool:
    """Whether the transfer has ended with an error."""
    return loading.done() and loading.exception() is not None
