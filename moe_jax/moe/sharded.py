"""The layer over many devices: each routes and computes its own share of the batch.

Exchange between devices lies above the mixture: no implementation of the experts knows of devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.config import ExchangeConfig, MoEConfig
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.implementation import implementation, mixture_of, uses_kernels
from moe_jax.moe.lanes import Matrices
from moe_jax.moe.layer import Choice, Gate, Layer, RouterStats, choose, mix, moe_layer
from moe_jax.moe.replicas import slots_of_experts
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.exchange import exchange_in_force
from moe_jax.parallel.fetch import fetch
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
    shared_by,
    sum_over_batch,
)
from moe_jax.parallel.rules import place, within_experts

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
        out, choice = moe_layer(x, layer, config, context)
        return out, choice.stats
    hidden = layer.down.shape[1]
    require(
        hidden % sizes.get(TENSOR, 1) == 0,
        f"parallel.tensor={sizes.get(TENSOR)} does not divide the experts' hidden width {hidden}",
    )
    stored = _Stored(layer.gate_up, layer.down, slots=_slots(layer, exchange))
    whole = stored.slots is None
    specs = stored._replace(
        gate_up=_spec(GATE_UP, layer.gate_up, whole, "moe.gate_up"),
        down=_spec(DOWN, layer.down, whole, "moe.down"),
        slots=P(),
    )

    def local(batch: Any, gate: Gate, stored: _Stored, key: Array | None) -> Any:
        x, tokens, documents, noise = batch
        if rows:
            # Marked as each device's own, so that a custom_vjp may return its device's part of
            # their gradient. The transpose of the mark is the sum over devices.
            gate = own_copies(gate, rows)
        own = RoutingContext(tokens, key, documents, noise)
        choice = choose(x, gate, config, own)
        travels = EXPERT in sizes and exchange.kind != "weights"
        mixed = partial(_mix_exchanged, stored.slots) if travels else _mix_gathered
        bring = partial(_brought, stored, specs, sum_dtype(x.dtype, gradient), x.dtype)
        out, counts = mixed(x, choice, bring, config)
        stats = choice.stats._replace(experts=None, **counts)
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
    (out, experts), stats = spread(batch, layer.gate, stored, context.key)
    return out, stats._replace(experts=experts)


class _Stored(NamedTuple):
    """A layer's experts as they are stored, or the layout of each of them."""

    gate_up: Any
    down: Any
    slots: Any
    """The expert in each slot. None: device d has the d-th part of all experts."""


def _slots(layer: Layer, exchange: ExchangeConfig) -> Int[Array, "slots"] | None:
    """The layer's, or all experts in order in evaluation, which has no replicas."""
    if not exchange.rebalance or EXPERT not in axis_sizes():
        return None
    return jnp.arange(len(layer.down)) if layer.slots is None else layer.slots


def _spec(letters: tuple[str, ...], array: Array, whole_experts: bool, name: str) -> P:
    own = letters if whole_experts else within_experts(letters)
    return place(own, array.shape, axis_sizes(), name)


def _mix_gathered(
    x: Float[Array, "B L D"],
    choice: Choice,
    bring: Callable[..., Matrices],
    config: MoEConfig,
) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
    """(layer.mix with all experts gathered to every device, no statistics).

    On the tensor axis each device has its hidden units of every expert, and outputs are summed.
    """
    gate_up, down = bring(keep=())
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    return _sum_over_tensor(mix(x, weights, choice.plan, gate_up, down, config)), {}


def _mix_exchanged(
    slots: Int[Array, "slots"] | None,
    x: Float[Array, "B L D"],
    choice: Choice,
    bring: Callable[..., Matrices],
    config: MoEConfig,
) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
    """(layer.mix with every expert on devices of the expert axis, statistics of the exchange)."""
    matrices = bring(keep=(EXPERT,))
    reads_sources = implementation(config.implementation, config.precision) == "triton"
    sharding = Sharding(
        EXPERT,
        manual_axes()[EXPERT],
        exchange_in_force(),
        mixture_of(config),
        kernels=uses_kernels(config),
        in_place=reads_sources and config.precision == "compute",
    )
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    # The plan's experts and not the router's: it has dropped what is beyond a capacity.
    experts = choice.plan.experts
    if slots is not None:
        experts = slots_of_experts(choice.plan, slots, lax.axis_index(EXPERT))
    assigned = Assigned(experts, weights)
    tokens = x.reshape(-1, x.shape[-1])
    out, waited = expert_parallel(tokens, assigned, Experts(matrices), sharding)
    counts = {
        "waited": sum_over_batch(largest(waited, (TENSOR,))),
        "busiest": _busiest(experts // len(matrices.down), sharding.devices),
    }
    return _sum_over_tensor(out).reshape(x.shape), counts


def _busiest(device: Int[Array, "T K"], devices: int) -> Float[Array, ""]:
    """RouterStats.busiest, for assignments that go to these devices of the expert axis."""
    rows = jnp.sum(device.reshape(-1, 1) == jnp.arange(devices), axis=0)
    most = largest(jnp.max(lax.psum(rows, EXPERT)))
    return most.astype(jnp.float32) * shared_by()


def _brought(
    stored: _Stored,
    specs: _Stored,
    gradient: jnp.dtype,
    dtype: jnp.dtype,
    *,
    keep: tuple[str, ...],
) -> Matrices:
    """The experts' matrices with this device's hidden units. Experts stay split over `keep`."""

    def one(part: Array, spec: P, keep: tuple[str, ...]) -> Array:
        if stored.slots is None:
            return gather(part, spec, dtype, gradient, keep)
        others = tuple(axis for axis in keep if axis != EXPERT)  # slots are split over that one
        return fetch(part, stored.slots, spec, dtype, gradient, others)

    gate_up = one(stored.gate_up, specs.gate_up, keep)
    down = one(stored.down, specs.down, (*keep, TENSOR))
    if TENSOR in manual_axes():
        gate_up = _own_columns(gate_up, down.shape[1])
    return Matrices(gate_up, down)


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
