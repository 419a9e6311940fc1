"""Gluon's modules as a kernel names them, with functions that run on a gluon_machine.Machine."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from moe_kernels.launch.gluon_machine import Barrier, Descriptor, Machine, Pointer, Shared, tensor

LANES = 32


def language(machine: Machine) -> dict[str, SimpleNamespace]:
    """What replaces a kernel module's globals, by name."""
    return {
        "gl": _core(machine),
        "tl": _core(machine),
        "mbarrier": _barriers(machine),
        "tma": _copies(machine),
        "async_copy": _thread_copies(machine),
        "hopper": _hopper(machine),
        "blackwell": _blackwell(machine),
    }


def _core(machine: Machine) -> SimpleNamespace:
    no_layout = lambda *_, **__: None  # noqa: E731
    return SimpleNamespace(
        int64=np.int64,
        float32=np.float32,
        BlockedLayout=no_layout,
        SliceLayout=no_layout,
        NVMMADistributedLayout=no_layout,
        NVMMASharedLayout=SimpleNamespace(get_default_for=no_layout),
        static_range=range,
        program_id=lambda _: machine.program,
        num_warps=lambda: machine.local.warps,
        arange=lambda start, end, _=None: tensor(np.arange(start, end, dtype=np.int32)),
        zeros=lambda shape, dtype, _=None: tensor(np.zeros(shape, dtype)),
        cdiv=lambda a, b: -(-a // b),
        minimum=min,
        maximum=max,
        where=_where,
        exp=np.exp,
        load=Pointer.load,
        store=Pointer.store,
        convert_layout=lambda value, _: value,
        allocate_shared_memory=lambda dtype, shape, _: Shared(_poison(shape, dtype)),
        warp_specialize=machine.specialise,
    )


def _where(condition: Any, a: Any, b: Any) -> Any:
    chosen = np.where(condition, a, b)
    return tensor(chosen) if chosen.ndim else chosen.item()


def _poison(shape: Sequence[int], dtype: Any) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def _barriers(machine: Machine) -> SimpleNamespace:
    def allocate(batch: int) -> SimpleNamespace:
        return SimpleNamespace(index=[Barrier(machine) for _ in range(batch)].__getitem__)

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def arrive(barrier: Barrier, pred: bool = True) -> None:
        if pred:
            barrier.arrive()

    return SimpleNamespace(
        allocate_mbarrier=allocate,
        init=init,
        arrive=arrive,
        expect=lambda barrier, size: barrier.arrive(expected=size),
        wait=Barrier.wait,
    )


def _copies(machine: Machine) -> SimpleNamespace:
    """TMA. Copies end in any order."""

    def start(numbers: np.ndarray, barrier: Barrier, target: Shared) -> None:
        target.array[...] = np.nan

        def end() -> None:
            target.array[...] = numbers.reshape(target.shape)
            barrier.arrive(arrivals=0, copied=numbers.nbytes)

        machine.submit(object(), end)

    def load(source: Descriptor, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
        start(source.read(at), barrier, target)

    def gather(
        source: Descriptor, rows: np.ndarray, column: int, barrier: Barrier, target: Shared
    ) -> None:
        start(source.gather(rows, column), barrier, target)

    return SimpleNamespace(async_load=load, async_gather=gather)


def _thread_copies(machine: Machine) -> SimpleNamespace:
    """cp.async. A partition's copies, and its arrivals after them, end in their order."""

    def load(target: Shared, pointer: Pointer, mask: Any) -> None:
        numbers = pointer.load(mask)
        target.array[...] = np.nan

        def end() -> None:
            target.array[...] = numbers
            machine.copied.add(target.address())

        machine.submit("cp.async", end)

    def arrive(barrier: Barrier, increment_count: bool) -> None:
        threads = 0 if increment_count else LANES * machine.local.warps
        machine.submit("cp.async", lambda: barrier.arrive(threads))

    return SimpleNamespace(async_load=load, mbarrier_arrive=arrive)


def _operands(machine: Machine, a: Shared, b: Shared) -> tuple[np.ndarray, np.ndarray]:
    """Both operands of a product, in float32."""
    for part in (a, b):
        if part.address() in machine.copied:
            raise RuntimeError("a product of numbers that threads copied, without a fence")
    return a.array.astype(np.float32), b.array.astype(np.float32)


def _hopper(machine: Machine) -> SimpleNamespace:
    """wgmma, which runs when it is waited for."""

    def start(a: Shared, b: Shared, acc: np.ndarray, is_async: bool) -> np.ndarray:
        machine.local.products.append((a, b, acc, _operands(machine, a, b)))
        return acc

    def wait(running: int, deps: Any) -> Any:
        products = machine.local.products
        while len(products) > running:
            a, b, acc, before = products.pop(0)
            left, right = _operands(machine, a, b)
            if not all(map(_equal, before, (left, right))):
                raise RuntimeError("an operand was overwritten before its product was done")
            acc += left @ right
        return deps

    return SimpleNamespace(
        fence_async_shared=machine.copied.clear, warpgroup_mma=start, warpgroup_mma_wait=wait
    )


def _blackwell(machine: Machine) -> SimpleNamespace:
    """tcgen05, which runs by itself, in its order."""

    def product(
        a: Shared, b: Shared, acc: "_TensorMemory", use_acc: bool, mbarriers: Sequence[Barrier] = ()
    ) -> None:
        def run() -> None:
            left, right = _operands(machine, a, b)
            acc.array[...] = left @ right + (acc.array if use_acc else 0)

        machine.submit("tcgen05", run)
        for barrier in mbarriers:
            commit(barrier)

    def commit(barrier: Barrier) -> None:
        machine.submit("tcgen05", barrier.arrive)

    return SimpleNamespace(
        tma=_copies(machine),
        tcgen05_mma=product,
        tcgen05_commit=commit,
        TensorMemoryLayout=lambda *_, **__: None,
        allocate_tensor_memory=lambda dtype, shape, _: _TensorMemory(_poison(shape, dtype)),
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


class _TensorMemory:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def load(self) -> Any:
        """Its numbers in registers."""
        return tensor(self.array.copy())
