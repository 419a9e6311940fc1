"""The machine on which gluon_interpreter runs a program: memory, barriers and threads."""

import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

WAIT_SECONDS = 30.0
"""A barrier that is not completed by then never will be."""
TMA_BYTES = 16
"""The start of a box in its innermost dimension is a multiple of it."""


class Tensor(np.ndarray):
    """Numbers in registers."""

    def to(self, dtype: Any) -> "Tensor":
        """Converted, to the nearest and even."""
        converted: Any = self.astype(dtype)
        return converted


def tensor(array: Any) -> Tensor:
    """An array as numbers in registers."""
    view: Any = np.asarray(array).view(Tensor)
    return view


class Pointer:
    """Addresses in an array in global memory."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array = array
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=array.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.offset + offset)

    def load(self, mask: Any = True) -> Any:
        """Numbers under the mask and zeros elsewhere."""
        offset, mask = np.broadcast_arrays(self.offset, mask)
        self.check(offset[mask])
        loaded = np.where(mask, self.array[np.where(mask, offset, 0)], self.array.dtype.type(0))
        return tensor(loaded) if loaded.ndim else loaded.item()

    def store(self, value: Any, mask: Any = True) -> None:
        """Writes the numbers under the mask."""
        offset, value, mask = np.broadcast_arrays(self.offset, value, mask)
        self.check(offset[mask])
        self.array[offset[mask]] = value[mask]

    def check(self, offsets: np.ndarray) -> None:
        """Raises IndexError for an address outside of the array."""
        if np.any((offsets < 0) | (offsets >= self.array.size)):
            raise IndexError("an address outside of its array")


class Descriptor:
    """An array in global memory, read in boxes. What lies past its end is zeros."""

    def __init__(self, array: np.ndarray, box: Sequence[int]) -> None:
        self.array = array
        self.box = tuple(box)
        self.dtype = array.dtype
        self.layout = None
        self.nbytes_per_cta = int(np.prod(box)) * array.itemsize

    def read(self, start: Sequence[int]) -> np.ndarray:
        """The box at `start`."""
        if start[-1] * self.array.itemsize % TMA_BYTES:
            raise ValueError("a box that does not start at a multiple of 16 bytes")
        out = np.zeros(self.box, self.dtype)
        inside = tuple(slice(s, s + size) for s, size in zip(start, self.box, strict=True))
        part = self.array[inside]
        out[tuple(slice(size) for size in part.shape)] = part
        return out

    def gather(self, rows: np.ndarray, column: int) -> np.ndarray:
        """Rows of a matrix, a box's width of each."""
        return np.concatenate([self.read((int(row), column)) for row in rows])


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape

    def index(self, number: int) -> "Shared":
        """A part, by the first dimension."""
        return Shared(self.array[number])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        """The same part in another shape."""
        return Shared(self.array.reshape(shape))

    def address(self) -> int:
        """The part's address."""
        return self.array.ctypes.data


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that it expects are there."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, arrivals: int = 1, expected: int = 0, copied: int = 0) -> None:
        """Arrivals, bytes that are expected from now on, and bytes that have come."""
        with self.machine.changed:
            self.pending -= arrivals
            self.bytes += expected - copied
            if self.pending < 0:
                raise RuntimeError("more arrivals at a barrier than it counts")
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
                self.machine.changed.notify_all()

    def wait(self, parity: int) -> None:
        """Returns when the phase of this parity is over."""
        with self.machine.changed:
            over = lambda: self.phase % 2 != parity or self.machine.failure  # noqa: E731
            if not self.machine.changed.wait_for(over, WAIT_SECONDS):
                raise RuntimeError("a barrier that nobody completes")
            if self.machine.failure:
                raise RuntimeError("another partition failed")


class Machine:
    """One program: its barriers' lock, its partitions' threads, and what runs by itself."""

    def __init__(self, program: int, warps: int, drawn: random.Random) -> None:
        self.program = program
        self.drawn = drawn
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.local = threading.local()
        self.local.warps = warps
        self.local.products = []
        self.queues: dict[Any, list[Callable[[], None]]] = {}
        self.copied: set[int] = set()
        """Addresses in shared memory that threads copied to, and no fence has passed since."""
        self.working = threading.Event()

    def __enter__(self) -> "Machine":
        self.working.set()
        self.engine = threading.Thread(target=self.guarded, args=(self.work,))
        self.engine.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.working.clear()
        self.engine.join()
        if self.failure:
            raise self.failure

    def submit(self, queue: Any, work: Callable[[], None]) -> None:
        """Has work done later, after what is in the same queue already."""
        with self.changed:
            self.queues.setdefault(queue, []).append(work)
            self.changed.notify_all()

    def work(self) -> None:
        """Does what is submitted, in an order that is drawn."""
        while True:
            with self.changed:
                ready = [name for name, queue in self.queues.items() if queue]
                if not ready and not self.working.is_set():
                    return
                if not ready:
                    self.changed.wait(0.001)
                    continue
                item = self.queues[self.drawn.choice(ready)].pop(0)
            item()

    def guarded(self, function: Callable[..., None], *arguments: Any) -> None:
        """Runs a thread's function, and tells the other threads if it fails."""
        try:
            with np.errstate(all="ignore"):
                function(*arguments)
        except BaseException as error:  # noqa: BLE001 (it is raised again in __exit__)
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def specialise(self, partitions: Sequence[Any], warps: Sequence[int], _: Any) -> None:
        """gl.warp_specialize: the first partition with the program's warps, the others beside."""

        def run(function: Any, arguments: Any, its_warps: int) -> None:
            self.local.warps = its_warps
            self.local.products = []
            function(*arguments)

        threads = [
            threading.Thread(target=self.guarded, args=(run, *partition, its_warps))
            for partition, its_warps in zip(partitions, (self.local.warps, *warps), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
