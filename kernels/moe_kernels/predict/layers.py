"""The launches of a layer, forward and with gradients, and their names."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from moe_kernels.bench.shapes import Shape
from moe_kernels.experts import mixture
from moe_kernels.gate import GateConfig, gate
from moe_kernels.launch import Launch, recording
from moe_kernels.schedule.api import choose_block_rows, schedule, schedule_shape


def layer_arrays(shape: Shape, dtype: str) -> tuple[Any, ...]:
    """x [T, D], weights [T, K], gate_up [E, D, 2F], down [E, F, D] and the plan, as shapes."""
    t, d, f, e, k = shape
    return (
        ShapeDtypeStruct((t, d), dtype),
        ShapeDtypeStruct((t, k), jnp.float32),
        ShapeDtypeStruct((e, d, 2 * f), dtype),
        ShapeDtypeStruct((e, f, d), dtype),
        schedule_shape(t, k, e, choose_block_rows(t * k, e)),
    )


def routing_launches(shape: Shape, arch: int) -> list[Launch]:
    """The launches of a softmax gate and of the schedule."""
    t, _, _, e, k = shape
    rows = choose_block_rows(t * k, e)
    with recording(arch) as launches:
        # Lambdas: JAX does not trace a function twice, and the architecture is no argument.
        jax.eval_shape(
            lambda logits: gate(logits, None, GateConfig(k, "softmax")),
            ShapeDtypeStruct((t, e), jnp.float32),
        )
        jax.eval_shape(
            lambda chosen: schedule(chosen, e, rows), ShapeDtypeStruct((t, k), jnp.int32)
        )
    return launches


def forward_launches(shape: Shape, arch: int, dtype: str = "bfloat16") -> list[Launch]:
    """The launches of the experts without gradients."""
    with recording(arch) as launches:
        jax.eval_shape(lambda *arrays: mixture(*arrays), *layer_arrays(shape, dtype))
    return launches


def train_launches(shape: Shape, arch: int, dtype: str = "bfloat16") -> list[Launch]:
    """The launches of the experts with their gradients: those of the forward pass, which keeps z,
    then those of the backward pass."""

    def train(*inputs: Any) -> Any:
        *arrays, plan = inputs
        out, pull = jax.vjp(partial(mixture, plan=plan), *arrays)
        return out, pull(out)  # any cotangent of out's shape will do

    with recording(arch) as launches:
        jax.eval_shape(train, *layer_arrays(shape, dtype))
    return launches


def launch_name(launch: Launch) -> str:
    """The job of a launch of forward_launches, train_launches or routing_launches.

    The four launches of the schedule have one name.
    """
    name = launch.kernel.__name__.removesuffix("_kernel")
    constants = launch.constants
    match name:
        case "rows":
            # The input's gradient reads gate_up transposed: the contraction is contiguous.
            return "input gradient" if constants["STRIDE_K"] == 1 else "down"
        case "combine":
            return "combine" if constants["WEIGHTED"] else "combine, unweighted"
        case "matrix_gradient":
            return "gate_up gradient" if constants["GATHER_LEFT"] else "down gradient"
        case "histogram" | "scan" | "layout" | "place":
            return "schedule"
    return name.replace("_", " ")


BACKWARD = (
    "hidden gradient",
    "down gradient",
    "gate_up gradient",
    "input gradient",
    "combine, unweighted",
)
"""The names of the backward pass's launches."""
