"""launch: a Triton kernel as a function of JAX arrays, under jit, vmap and shard_map."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax

from moe_kernels.launch.assembler import choose_assembler
from moe_kernels.launch.asynchronous import Boxes, call_gluon
from moe_kernels.launch.gluon_interpreter import interpret_gluon
from moe_kernels.launch.interpreter import interpret
from moe_kernels.launch.support import interpreting, lowering_for, lowering_target, require_triton

Grid = tuple[int] | tuple[int, int]


class Tuning(NamedTuple):
    """How a kernel is compiled."""

    warps: int = 4
    """Warps of 32 threads that share a program's tile."""
    stages: int = 3
    """Buffers of shared memory that asynchronous copies fill in turn."""


class Launch(NamedTuple):
    """A kernel with the shapes and constants that it is compiled for."""

    kernel: Any
    inputs: tuple[ShapeDtypeStruct, ...]
    outputs: tuple[ShapeDtypeStruct, ...]
    tuning: Tuning
    constants: dict[str, Any]
    boxes: Boxes


_record: ContextVar[list[Launch] | None] = ContextVar("record", default=None)


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below `number`. Triton's tiles have no other sizes."""
    return 1 << (number - 1).bit_length()


@contextmanager
def recording(capability: int) -> Iterator[list[Launch]]:
    """Yields a list to which every launch traced inside is appended. The outputs are zeros."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        with lowering_for(capability):
            yield launches
    finally:
        _record.reset(token)


def launch(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Grid,
    tuning: Tuning,
    boxes: Boxes | None = None,
    **constants: Any,
) -> list[Array]:
    """Runs `kernel(*inputs, *outputs, **constants)`, a function under triton.jit, on a grid.

    With `boxes` it is a function under gluon.jit, which gets TMA descriptors for those inputs.

    Outputs are not initialised, so the kernel must write every number that is read later. It works
    under jit, shard_map and vmap (one element after the other). Gradients are the caller's, by
    custom_vjp. Raises UnavailableError where kernels cannot run.
    """
    require_triton()
    launches = _record.get()
    if launches is not None:
        shapes = tuple(ShapeDtypeStruct(array.shape, array.dtype) for array in inputs)
        launches.append(Launch(kernel, shapes, tuple(outputs), tuning, constants, boxes or {}))
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]

    # jax-triton has no batching rule. Sizes are constants of the kernel, so a batched launch would
    # be another kernel: elements run one after the other.
    @jax.custom_batching.sequential_vmap
    def run(*arrays: Array) -> list[Array]:
        if boxes:
            run_gluon = interpret_gluon if interpreting() else call_gluon
            return run_gluon(
                kernel, arrays, outputs, grid, tuning.warps, boxes=boxes, constants=constants
            )
        if interpreting():
            return interpret(kernel, arrays, outputs, grid, constants)
        return _compile(kernel, arrays, outputs, grid, tuning, constants)

    axes = frozenset().union(*(_varying_axes(array) for array in inputs))
    return [_mark_varying(result, axes) for result in run(*inputs)]


def _varying_axes(array: Array) -> frozenset[Any]:
    """The mesh axes over which each device has its own value, inside shard_map."""
    return jax.typeof(array).manual_axis_type.varying


def _mark_varying(array: Array, axes: frozenset[Any]) -> Array:
    """Marks a result as each device's own over the axes on which its inputs differ.

    shard_map cannot look into a kernel or a callback. Without the mark it would take the result for
    the same on all devices, and its gradient for a sum.
    """
    missing = tuple(axes - _varying_axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array


def _compile(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Grid,
    tuning: Tuning,
    constants: dict[str, Any],
) -> list[Array]:
    choose_assembler()
    import jax_triton

    # jax-triton 0.4 renamed it.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    out_type = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        grid=grid,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        compute_capability=lowering_target(),  # None: that of the device at hand
        **{out_type: list(outputs)},
        **constants,
    )
