"""Memory that holds experts: that of the device, and the host's below it.

Where the device's memory is the host's own (a CPU), an expert is read straight to where the device
computes with it: no copy is made after the read, and nothing is allocated for it.
"""

from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from moe_jax.placement.files import ExpertFiles, Matrices, page_memory

Expert = tuple[Array, Array]
"""(gate_up [D, 2F], down [F, D])"""


class Landing:
    """Page-aligned memory for one record, and, where `device` can compute with it in place, its
    matrices as arrays of that device."""

    def __init__(self, files: ExpertFiles, device: Any) -> None:
        self.memory, self._files = page_memory(files.record_bytes), files
        views = files.matrices(self.memory)
        here = SingleDeviceSharding(device)
        shared = jax.device_put(views, here, may_alias=True)
        in_place = device.platform == "cpu" and all(
            array.unsafe_buffer_pointer() == view.ctypes.data
            for array, view in zip(shared, views, strict=True)
        )
        self.shared: Expert | None = shared if in_place else None


class Held(NamedTuple):
    """An expert in a memory."""

    matrices: Expert
    landing: Landing | None
    """Given back when the expert leaves; None where the arrays own their memory."""


class Memory(Protocol):
    """What holds experts."""

    def read(self, layer: int, expert: int, files: ExpertFiles) -> Held:
        """From the disk. UserError as ExpertFiles.read."""
        ...

    def copy(self, held: Held) -> Held:
        """From another memory."""
        ...

    def release(self, held: Held) -> None:
        """Nobody computes with this expert any more."""
        ...


class SharedMemory:
    """Room for `count` experts in memory that host and CPU device share; a read waits for room.

    Experts whose matrices do not lie at 64 bytes, and those of other files, have arrays of their
    own and only count as if they lay there."""

    def __init__(self, files: ExpertFiles, count: int, device: Any) -> None:
        self._files, self._free = files, SimpleQueue[Landing]()
        for _ in range(count):
            self._free.put(Landing(files, device))
        self._device = SingleDeviceSharding(device)

    def read(self, layer: int, expert: int, files: ExpertFiles) -> Held:
        landing = self._free.get()
        try:
            if files is self._files and landing.shared is not None:
                files.read(layer, expert, landing.memory)
                return Held(landing.shared, landing)
            return Held(_own(files.read(layer, expert), self._device), landing)
        except BaseException:
            self._free.put(landing)
            raise

    def copy(self, held: Held) -> Held:
        landing = self._free.get()
        if landing.shared is not None and held.landing is not None:
            landing.memory[:] = held.landing.memory
            return Held(landing.shared, landing)
        return Held(_own(held.matrices, self._device), landing)

    def release(self, held: Held) -> None:
        assert held.landing is not None
        self._free.put(held.landing)


class DeviceMemory:
    """A device's own memory, or the host's pinned for it: every expert has arrays of its own."""

    def __init__(self, device: Any, kind: str) -> None:
        self._where = SingleDeviceSharding(device, memory_kind=kind)

    def read(self, layer: int, expert: int, files: ExpertFiles) -> Held:
        return Held(_own(files.read(layer, expert), self._where), None)

    def copy(self, held: Held) -> Held:
        return Held(_own(held.matrices, self._where), None)

    def release(self, held: Held) -> None:
        pass


def _own(matrices: Matrices | Expert, where: SingleDeviceSharding) -> Expert:
    """The matrices as arrays that share no memory with them."""
    # On a CPU device_put may keep a NumPy array itself, here a buffer that is read into again.
    gate_up, down = (m.copy() if isinstance(m, np.ndarray) else m for m in matrices)
    return jax.block_until_ready(jax.device_put((gate_up, down), where, may_alias=False))


def device_memory(files: ExpertFiles, count: int, device: Any) -> Memory:
    """Memory of `device` for `count` experts."""
    if device.platform == "cpu":
        return SharedMemory(files, count, device)
    return DeviceMemory(device, "device")


def host_memory(files: ExpertFiles, count: int, device: Any, compute: bool) -> Memory:
    """Host memory below `device` for `count` experts: pinned, so that copies to the device are
    fast, or, to `compute` with it, memory of the CPU's own device."""
    if device.platform == "cpu" or compute:
        return SharedMemory(files, count, jax.local_devices(backend="cpu")[0])
    return DeviceMemory(device, "pinned_host")
