"""The layer over many devices: each routes and computes its own share of the batch.

Exchange between devices lies above the mixture: no implementation of the experts knows of devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.config import MoEConfig
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.implementation import implementation, mixture_of, uses_kernels
from moe_jax.moe.lanes import Matrices
from moe_jax.moe.layer import Choice, Gate, Layer, RouterStats, choose, mix, moe_layer
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.exchange import exchange_in_force
from moe_jax.parallel.gather import gather, sum_dtype
from moe_jax.parallel.mesh import (
    EXPERT,
    TENSOR,
    axis_sizes,
    batch_axes,
    free_axes,
    largest,
    manual_axes,
    own_copies,
    sum_over_batch,
)
from moe_jax.parallel.rules import place

GATE_UP = ("E", "D", "2F")
DOWN = ("E", "F", "D")
"""Letters of the experts' matrices (parallel.rules)."""


def over_data(
    x: Float[Array, "B L D"],
    context: RoutingContext,
    layer: Layer,
    config: MoEConfig,
    gradient: str = "float32",
) -> tuple[Float[Array, "B L D"], RouterStats]:
    """moe_layer on every device's rows of x, and the statistics over the whole batch.

    `layer` has its arrays as they are stored. Its experts are computed in the dtype of x. Their
    gradients are summed over devices in the dtype `gradient`.
    """
    sizes = axis_sizes()
    rows = batch_axes()
    exchange = exchange_in_force()
    if not rows and TENSOR not in sizes:
        return _on_this_device(x, context, layer, config)
    hidden = layer.down.shape[1]
    require(
        hidden % sizes.get(TENSOR, 1) == 0,
        f"parallel.tensor={sizes.get(TENSOR)} does not divide the experts' hidden width {hidden}",
    )
    specs = (
        place(GATE_UP, layer.gate_up.shape, sizes, "moe.gate_up"),
        place(DOWN, layer.down.shape, sizes, "moe.down"),
    )

    def local(batch: Any, gate: Gate, experts: tuple[Array, Array], key: Array | None) -> Any:
        x, tokens, documents, noise = batch
        if rows:
            # Marked as each device's own, so that a custom_vjp may return its device's part of
            # their gradient. The transpose of the mark is the sum over devices.
            gate = own_copies(gate, rows)
        own = RoutingContext(tokens, key, documents, noise)
        choice = choose(x, gate, config, own)
        mixed = _mix_exchanged if EXPERT in sizes and exchange.kind != "weights" else _mix_gathered
        out, waited = mixed(x, choice, experts, specs, config, gradient)
        stats = choice.stats._replace(experts=None, waited=sum_over_batch(waited))
        # The chosen experts are rows of the batch. The other statistics are the same everywhere.
        return (out, choice.stats.experts), stats

    spread = jax.shard_map(
        local,
        in_specs=(P(rows), P(), specs, P()),
        out_specs=(P(rows), P()),
        axis_names=free_axes(),
    )
    noise = context.draw_noise(config, x.shape[:-1])
    batch = (x, context.tokens, context.documents, noise)
    (out, experts), stats = spread(batch, layer.gate, (layer.gate_up, layer.down), context.key)
    return out, stats._replace(experts=experts)


def _on_this_device(
    x: Float[Array, "B L D"], context: RoutingContext, layer: Layer, config: MoEConfig
) -> tuple[Float[Array, "B L D"], RouterStats]:
    """over_data where nothing is left to the partitioner, such as in a pipeline.

    The layer has all experts, or those of this device of the expert axis.
    """
    if len(layer.down) == config.experts:
        out, choice = moe_layer(x, layer, config, context)
        return out, choice.stats
    choice = choose(x, layer.gate, config, context)
    matrices = Matrices(layer.gate_up.astype(x.dtype), layer.down.astype(x.dtype))
    out, waited = _exchange(x, choice.routing.weights, choice, matrices, config)
    return out, choice.stats._replace(waited=sum_over_batch(waited))


def _mix_gathered(
    x: Float[Array, "B L D"],
    choice: Choice,
    experts: tuple[Array, Array],
    specs: tuple[P, P],
    config: MoEConfig,
    gradient: str,
) -> tuple[Float[Array, "B L D"], Int[Array, ""]]:
    """(layer.mix with all experts gathered to every device, 0 copies that waited).

    On the tensor axis each device has its hidden units of every expert, and outputs are summed.
    """
    gate_up, down = _gathered(experts, specs, sum_dtype(x.dtype, gradient), x.dtype)
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    out = mix(x, weights, choice.plan, gate_up, down, config)
    return _sum_over_tensor(out), jnp.int32(0)


def _mix_exchanged(
    x: Float[Array, "B L D"],
    choice: Choice,
    experts: tuple[Array, Array],
    specs: tuple[P, P],
    config: MoEConfig,
    gradient: str,
) -> tuple[Float[Array, "B L D"], Int[Array, ""]]:
    """(layer.mix with every expert on its own device of the expert axis, copies that waited)."""
    wide = sum_dtype(x.dtype, gradient)
    matrices = Matrices(*_gathered(experts, specs, wide, x.dtype, keep=(EXPERT,)))
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    out, waited = _exchange(x, weights, choice, matrices, config)
    return _sum_over_tensor(out), largest(waited, (TENSOR,))


def _exchange(
    x: Float[Array, "B L D"],
    weights: Float[Array, "T K"],
    choice: Choice,
    matrices: Matrices,
    config: MoEConfig,
) -> tuple[Float[Array, "B L D"], Int[Array, ""]]:
    """(layer.mix by the experts of all devices of the expert axis, this device's copies that
    waited). `matrices` are this device's own experts."""
    reads_sources = implementation(config.implementation, config.precision) == "triton"
    sharding = Sharding(
        EXPERT,
        manual_axes()[EXPERT],
        exchange_in_force(),
        mixture_of(config),
        kernels=uses_kernels(config),
        in_place=reads_sources and config.precision == "compute",
    )
    # The plan's experts and not the router's: it has dropped what is beyond a capacity.
    assigned = Assigned(choice.plan.experts, weights)
    tokens = x.reshape(-1, x.shape[-1])
    out, waited = expert_parallel(tokens, assigned, Experts(matrices), sharding)
    return out.reshape(x.shape), waited


def _gathered(
    experts: tuple[Array, Array],
    specs: tuple[P, P],
    gradient: jnp.dtype,
    dtype: jnp.dtype,
    keep: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """(gate_up, down) with this device's hidden units. They stay split over the axes `keep`."""
    gate_up = gather(experts[0], specs[0], dtype, gradient, keep)
    down = gather(experts[1], specs[1], dtype, gradient, (*keep, TENSOR))
    return (_own_columns(gate_up, down.shape[1]) if TENSOR in manual_axes() else gate_up), down


def _on_tensor_devices(arrays: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same arrays, each device of the tensor axis with a gradient of its own."""
    return own_copies(arrays, {TENSOR} & manual_axes().keys())


def _sum_over_tensor(out: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    return lax.psum(out, TENSOR) if TENSOR in manual_axes() else out


def _own_columns(gate_up: Float[Array, "E D twoF"], hidden: int) -> Float[Array, "E D columns"]:
    """This device's `hidden` columns of the gate half, and then those of the up half."""
    halves = gate_up.reshape(*gate_up.shape[:2], 2, -1)
    own = lax.dynamic_slice_in_dim(halves, lax.axis_index(TENSOR) * hidden, hidden, axis=3)
    return own.reshape(*gate_up.shape[:2], -1)
