"""Memory that holds experts: that of the device, and the host's below it.

Where the device's memory is the host's own (a CPU), an expert is read straight to where the device
computes with it: no copy is made after the read, and nothing is allocated for it.
"""

from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from moe_jax.moe.experts import expert_output
from moe_jax.placement.files import ExpertFiles, Matrices
from moe_jax.placement.records.pages import page_memory

Expert = tuple[Array, Array]
"""(gate_up [D, 2F], down [F, D])"""


class RecordBuffer:
    """Page-aligned memory for one record.

    `shared`: the record's matrices as arrays of `device` that alias this memory, or None where the
    device cannot compute with it in place.
    """

    def __init__(self, files: ExpertFiles, device: Any) -> None:
        self.memory = page_memory(files.record_bytes)
        views = files.matrices(self.memory)
        shared = jax.device_put(views, SingleDeviceSharding(device), may_alias=True)
        # `may_alias` only permits it: XLA's CPU backend copies what does not lie at 64 bytes. The
        # addresses tell which it did. (Low-bit matrices are products, not views of the memory.)
        aliased = (
            device.platform == "cpu"
            and not files.low_bit
            and all(
                array.unsafe_buffer_pointer() == view.ctypes.data
                for array, view in zip(shared, views, strict=True)
            )
        )
        self.shared: Expert | None = shared if aliased else None


class LoadedExpert(NamedTuple):
    """An expert in a memory."""

    matrices: Expert
    buffer: RecordBuffer | None
    """Given back when the expert leaves. None where the arrays own their memory."""


class Memory(Protocol):
    """What holds experts. Any thread may call it."""

    def read(self, layer: int, expert: int, files: ExpertFiles) -> LoadedExpert:
        """From the disk. UserError as ExpertFiles.read."""
        ...

    def copy(self, loaded: LoadedExpert) -> LoadedExpert:
        """From another memory."""
        ...

    def release(self, loaded: LoadedExpert) -> None:
        """Takes the expert's memory back. Nothing may compute with it any more (store.Lease)."""
        ...


class SharedMemory:
    """Room for `count` experts in memory that host and CPU device share. A read waits for room.

    Experts whose matrices do not lie at 64 bytes, and those of other files, have arrays of their
    own and only count as if they lay here.
    """

    def __init__(self, files: ExpertFiles, count: int, device: Any) -> None:
        self._files = files
        self._device = SingleDeviceSharding(device)
        self._free = SimpleQueue[RecordBuffer]()
        for _ in range(count):
            self._free.put(RecordBuffer(files, device))

    def read(self, layer: int, expert: int, files: ExpertFiles) -> LoadedExpert:
        buffer = self._free.get()
        try:
            if files is self._files and buffer.shared is not None:
                files.read(layer, expert, buffer.memory)
                return LoadedExpert(buffer.shared, buffer)
            return LoadedExpert(_own(files.read(layer, expert), self._device), buffer)
        except BaseException:
            self._free.put(buffer)
            raise

    def copy(self, loaded: LoadedExpert) -> LoadedExpert:
        buffer = self._free.get()
        if buffer.shared is not None and loaded.buffer is not None:
            buffer.memory[:] = loaded.buffer.memory
            return LoadedExpert(buffer.shared, buffer)
        return LoadedExpert(_own(loaded.matrices, self._device), buffer)

    def release(self, loaded: LoadedExpert) -> None:
        assert loaded.buffer is not None, "the expert lies in another memory"
        self._free.put(loaded.buffer)


class DeviceMemory:
    """A device's own memory, or the host's pinned for it: every expert has arrays of its own."""

    def __init__(self, device: Any, kind: str) -> None:
        self._sharding = SingleDeviceSharding(device, memory_kind=kind)

    def read(self, layer: int, expert: int, files: ExpertFiles) -> LoadedExpert:
        return LoadedExpert(_own(files.read(layer, expert), self._sharding), None)

    def copy(self, loaded: LoadedExpert) -> LoadedExpert:
        return LoadedExpert(_own(loaded.matrices, self._sharding), None)

    def release(self, loaded: LoadedExpert) -> None:
        pass


def _own(matrices: Matrices | Expert, sharding: SingleDeviceSharding) -> Expert:
    """The matrices as arrays that share no memory with them."""
    # On a CPU device_put may keep a NumPy array itself, here a buffer that is read into again.
    gate_up, down = (m.copy() if isinstance(m, np.ndarray) else m for m in matrices)
    return jax.block_until_ready(jax.device_put((gate_up, down), sharding, may_alias=False))


def device_memory(files: ExpertFiles, count: int, device: Any) -> Memory:
    """Memory of `device` for `count` experts."""
    if device.platform == "cpu":
        return SharedMemory(files, count, device)
    return DeviceMemory(device, "device")


def host_memory(files: ExpertFiles, count: int, device: Any, compute: bool) -> Memory:
    """Host memory below `device` for `count` experts.

    It is pinned, so that copies to the device are fast. To `compute` with the experts in it, it is
    memory of the CPU's own device.
    """
    if device.platform == "cpu" or compute:
        return SharedMemory(files, count, jax.local_devices(backend="cpu")[0])
    return DeviceMemory(device, "pinned_host")


def break_even_rows(files: ExpertFiles, device: Memory, host: Memory) -> float:
    """Tokens of one expert up to which computing in host memory beats a copy to the device.

    Measured: seconds of a copy over seconds of one token's computation.
    """
    below = host.read(0, 0, files)
    above = device.copy(below)
    x = jnp.ones((1, files.gate_up_shape[0]), files.dtype)
    x = jax.device_put(x, below.matrices[0].sharding)
    compute = jax.jit(expert_output)
    compute_seconds = _seconds(lambda: compute(x, *below.matrices))
    copy_seconds = _seconds(lambda: device.copy(below).matrices)
    host.release(below)
    device.release(above)
    return copy_seconds / compute_seconds


def _seconds(call: Any) -> float:
    """Mean of three calls, after one that compiles."""
    jax.block_until_ready(call())
    begin = perf_counter()
    for _ in range(3):
        jax.block_until_ready(call())
    return (perf_counter() - begin) / 3
