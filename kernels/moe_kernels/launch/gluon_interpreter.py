"""Gluon kernels in NumPy: the part of Gluon that experts_async uses. Triton itself interprets none.

A program's partitions are threads. One more thread does the copies and the products in tensor
memory, in an order that is drawn. So what a kernel leaves to chance is seen:

- The target of a copy is NaN from the start of the copy to its end.
- A wgmma reads its operands when it is waited for. They must still be what they were at its start.
- An operand that threads copied (cp.async) is refused until a fence.
- A barrier that gets more arrivals than it counts, or that nobody completes, is an error.

Layouts, registers, swizzles and the memory order of threads are not modelled.
"""

import random
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, ShapeDtypeStruct

from moe_kernels.launch.asynchronous import Boxes
from moe_kernels.launch.gluon_machine import Descriptor, Machine, Pointer
from moe_kernels.launch.gluon_names import language
from moe_kernels.launch.interpreter import poisoned


def interpret_gluon(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Sequence[int],
    warps: int,
    *,
    boxes: Boxes,
    constants: dict[str, Any],
) -> list[Array]:
    """Runs a Gluon kernel in a callback of the JAX program, one program after the other."""

    def run(*arrays: Any) -> list[np.ndarray]:
        results = [poisoned(output) for output in outputs]
        sources = [np.array(array, order="C") for array in arrays]
        operands = [
            Descriptor(array, boxes[i]) if i in boxes else Pointer(array.reshape(-1))
            for i, array in enumerate((*sources, *results))
        ]
        for program in range(grid[0]):
            machine = Machine(program, warps, random.Random(program))
            function = as_python(kernel, language(machine), {})
            with machine:
                function(*operands, **constants)
        return results

    plain = [ShapeDtypeStruct(output.shape, output.dtype) for output in outputs]
    return jax.pure_callback(run, plain, *inputs)


def as_python(kernel: Any, names: dict[str, Any], modules: dict[int, dict[str, Any]]) -> Any:
    """The function under gluon.jit with Gluon's modules, by name, replaced; and those it calls."""
    function = kernel.fn
    if id(function.__globals__) not in modules:
        # Filled in two steps, because functions of a module call each other.
        replaced = modules[id(function.__globals__)] = function.__globals__ | names
        for name, value in function.__globals__.items():
            if hasattr(value, "fn") and name not in names:
                replaced[name] = as_python(value, names, modules)
    replaced = modules[id(function.__globals__)]
    return types.FunctionType(function.__code__, replaced, function.__name__, function.__defaults__)
