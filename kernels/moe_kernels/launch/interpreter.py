"""Kernels in Triton's interpreter, which runs them by NumPy on arrays of the host."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, ShapeDtypeStruct

_lock = threading.Lock()
"""Triton's interpreter replaces functions of triton.language while it runs, for the whole process.
XLA calls back from a thread per device, so kernels take turns."""


class _Tensor:
    """The part of a torch tensor's interface that Triton's interpreter uses, on a NumPy array.

    The interpreter copies its arguments to the host and the results back. These are on the host
    already, so its copies are the same memory and the kernel writes into `array` itself.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = _triton_dtype(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Tensor":
        return self

    def cpu(self) -> "_Tensor":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_Tensor":
        return _Tensor(np.empty(0, self.array.dtype))

    def set_(self, storage: "_Tensor", *_: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        # torch counts strides in elements, NumPy in bytes.
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other: "_Tensor") -> None:
        pass  # both are the same memory


def _triton_dtype(dtype: np.dtype) -> Any:
    import triton.language as tl

    # Triton's names differ for these two: e4nv is NVIDIA's E4M3, the one without infinities.
    names = {"float8_e4m3fn": "float8e4nv", "bool": "int1"}
    return getattr(tl, names.get(dtype.name, dtype.name))


def interpret(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: tuple[int, ...],
    constants: dict[str, Any],
) -> list[Array]:
    """Runs a kernel by NumPy, in a callback of the JAX program.

    Outputs start as NaN, or the least integer, so that a number which the kernel forgets to write
    is seen.
    """

    def run(*arrays: Any) -> list[np.ndarray]:
        # Copies, in C order: JAX's buffers are read-only and kernels compute offsets by rows.
        sources = [np.array(array, order="C") for array in arrays]
        results = [poisoned(output) for output in outputs]
        tensors = [_Tensor(array) for array in (*sources, *results)]
        with _lock:
            kernel[grid](*tensors, **constants)
        return results

    # Without a sharding that the caller's shapes may carry: the callback returns whole arrays.
    plain = [ShapeDtypeStruct(output.shape, output.dtype) for output in outputs]
    return jax.pure_callback(run, plain, *inputs)


def poisoned(output: ShapeDtypeStruct) -> np.ndarray:
    """An output that was not written yet: NaN, or the least integer."""
    dtype = np.dtype(output.dtype)
    worst = np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan
    return np.full(output.shape, worst, dtype)
