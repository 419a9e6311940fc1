"""How Triton kernels run here: compiled by jax-triton, interpreted by NumPy, or not at all."""

import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax

MINIMUM_CAPABILITY = 80
"""Ampere: the first with bfloat16 products and asynchronous copies."""
FP8_CAPABILITY = 89
"""Ada and Hopper: the first whose matrix units take E4M3."""

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of A100, H100 and B200, for programs that are lowered without the device."""

_target: ContextVar[int | None] = ContextVar("target", default=None)
_record: ContextVar["list[Launch] | None"] = ContextVar("record", default=None)
_interpreter = threading.Lock()
"""Triton's interpreter replaces Triton's own functions while it runs: one kernel at a time, though
devices call from threads of their own."""


Grid = tuple[int] | tuple[int, int]


class Support(NamedTuple):
    """A way to run kernels, and why it is this one."""

    name: Literal["gpu", "lower", "interpreter", "none"]
    reason: str


class UnavailableError(RuntimeError):
    """Kernels were asked for by name and cannot run; the message says why."""


@contextmanager
def lowering_for(capability: int) -> Iterator[None]:
    """Programs traced inside hold kernels for this compute capability (80, 90, 100), GPU or not.

    They can be lowered (`jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))`), not run.
    """
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


@contextmanager
def recording(capability: int) -> Iterator["list[Launch]"]:
    """Yields a list that grows by every launch that is traced inside; outputs are zeros."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        with lowering_for(capability):
            yield launches
    finally:
        _record.reset(token)


def triton_support() -> Support:
    """Finds the way without importing Triton (it exists for Linux only, and its import is slow).

    `gpu` needs an NVIDIA device of compute capability 8.0 or more; `lower` is inside lowering_for;
    `interpreter` (kernels run by NumPy, for tests) needs TRITON_INTERPRET=1 before Triton is
    imported.
    """
    if importlib.util.find_spec("triton") is None:
        return Support("none", "the package triton is not installed (it has wheels for Linux only)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Support("interpreter", "TRITON_INTERPRET=1")
    if target := _target.get():
        return Support("lower", f"lowering for compute capability {target / 10}")
    if jax.default_backend() != "gpu":
        return Support("none", f"the devices are {jax.default_backend()}, not NVIDIA GPUs")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) * 10 < MINIMUM_CAPABILITY:
        return Support(
            "none", f"{device.device_kind} has compute capability {capability}, below 8.0"
        )
    return Support("gpu", f"{device.device_kind}, compute capability {capability}")


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`: Triton's tiles have no other sizes."""
    return 1 << (number - 1).bit_length()


def capability() -> int:
    """Compute capability, times ten, that kernels are compiled for; 90 where they are not."""
    if target := _target.get():
        return target
    device = jax.devices()[0]
    return round(float(getattr(device, "compute_capability", None) or 9.0) * 10)


def multiprocessors() -> int:
    """Of the device that kernels run on, or of the one that they are lowered for."""
    own = None if _target.get() else getattr(jax.devices()[0], "core_count", None)
    return own or MULTIPROCESSORS.get(capability(), MULTIPROCESSORS[90])


def interpreting() -> bool:
    """Whether kernels are run by NumPy."""
    return triton_support().name == "interpreter"


def require() -> None:
    """Raises UnavailableError, with the reason and the ways out, where kernels cannot run."""
    _raise_if_none(triton_support(), "Triton kernels")


def fp8_support() -> Support:
    """triton_support for FP8: compiling it needs a compute capability of 8.9 or more."""
    support = triton_support()
    if support.name in ("gpu", "lower") and capability() < FP8_CAPABILITY:
        reason = (
            f"compute capability {capability() / 10} has no FP8 matrix units (8.9 and above do)"
        )
        return Support("none", reason)
    return support


def require_fp8() -> None:
    """Raises UnavailableError, as require does, where FP8 kernels cannot run."""
    _raise_if_none(fp8_support(), "FP8 kernels")


def _raise_if_none(support: Support, what: str) -> None:
    if support.name == "none":
        raise UnavailableError(
            f"{what} cannot run: {support.reason}; use implementation 'auto' or 'xla', "
            "or TRITON_INTERPRET=1 to run them in NumPy (slow, for tests)"
        )


class Tuning(NamedTuple):
    """What a kernel is compiled with."""

    warps: int = 4
    stages: int = 3


class Launch(NamedTuple):
    """A kernel with what it is compiled for."""

    kernel: Any
    inputs: tuple[ShapeDtypeStruct, ...]
    outputs: tuple[ShapeDtypeStruct, ...]
    tuning: Tuning
    constants: dict[str, Any]


def launch(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Grid,
    tuning: Tuning,
    **constants: Any,
) -> list[Array]:
    """Runs `kernel(*inputs, *outputs, **constants)`, a function under triton.jit, on a grid.

    Outputs are not initialised: the kernel writes whatever is read later. Under jit, shard_map and
    (one element after the other) vmap; gradients are the caller's, by custom_vjp.
    """
    require()
    launches = _record.get()
    if launches is not None:
        shapes = tuple(ShapeDtypeStruct(array.shape, array.dtype) for array in inputs)
        launches.append(Launch(kernel, shapes, tuple(outputs), tuning, constants))
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]

    @jax.custom_batching.sequential_vmap
    def run(*arrays: Array) -> list[Array]:
        if interpreting():
            return _interpret(kernel, arrays, outputs, grid, constants)
        return _compile(kernel, arrays, outputs, grid, tuning, constants)

    axes = frozenset().union(*(_axes(array) for array in inputs))
    return [_varying(result, axes) for result in run(*inputs)]


def _axes(array: Array) -> frozenset[Any]:
    """The mesh axes over which each device has its own value, inside shard_map."""
    return jax.typeof(array).manual_axis_type.varying


def _varying(array: Array, axes: frozenset[Any]) -> Array:
    """Marks a result as each device's own over the axes that its inputs differ on."""
    missing = tuple(axes - _axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array


def _compile(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Grid,
    tuning: Tuning,
    constants: dict[str, Any],
) -> list[Array]:
    import jax_triton

    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        out_shape=list(outputs),
        grid=grid,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        compute_capability=_target.get(),
        **constants,
    )


class _Tensor:
    """The part of a torch tensor's interface that Triton's interpreter uses, on a NumPy array."""

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
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def copy_(self, other: "_Tensor") -> None:
        pass  # both are the same memory


def _triton_dtype(dtype: np.dtype) -> Any:
    import triton.language as tl

    names = {"float8_e4m3fn": "float8e4nv", "bool": "int1"}
    return getattr(tl, names.get(dtype.name, dtype.name))


def _interpret(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Grid,
    constants: dict[str, Any],
) -> list[Array]:
    """Outputs start as NaN (or the least integer), so that what a kernel forgets is seen."""

    def run(*arrays: Any) -> list[np.ndarray]:
        held = [np.array(array, order="C") for array in arrays]
        results = [_poisoned(output) for output in outputs]
        tensors = [_Tensor(array) for array in (*held, *results)]
        with _interpreter:
            kernel[grid](*tensors, **constants)
        return results

    plain = [ShapeDtypeStruct(output.shape, output.dtype) for output in outputs]
    return jax.pure_callback(run, plain, *inputs)


def _poisoned(output: ShapeDtypeStruct) -> np.ndarray:
    dtype = np.dtype(output.dtype)
    worst = np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan
    return np.full(output.shape, worst, dtype)
