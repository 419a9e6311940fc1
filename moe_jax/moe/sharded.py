"""The layer over many devices: each routes and computes its own share of the batch.

Exchange between devices lies above the mixture: no implementation of the experts knows of devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
from moe_kernels.experts import Source

from moe_jax.base.errors import require
from moe_jax.config import MoEConfig
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.implementation import implementation, mixture_of, uses_kernels
from moe_jax.moe.lanes import Matrices
from moe_jax.moe.layer import (
    Choice,
    ExpertStack,
    Gate,
    Layer,
    RouterStats,
    choose,
    mix,
    moe_layer,
)
from moe_jax.moe.replicas import slots_of_experts
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.exchange import exchange_in_force
from moe_jax.parallel.fetch import fetch
from moe_jax.parallel.gather import gather, sum_dtype
from moe_jax.parallel.mesh import (
    BATCH,
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


class Stored(NamedTuple):
    """A layer's experts on the mesh: the arrays, or their PartitionSpecs."""

    gate_up: Any
    down: Any
    slots: Any = None
    """The expert in each slot of the devices, if experts change their devices. Then every device
    has a part of every expert (parallel.fetch), and otherwise whole experts."""
    stack: Any = None


def expert_stack(
    gate_up: Float[Array, "layers E D twoF"],
    down: Float[Array, "layers E F D"],
    config: MoEConfig,
    dtype: jnp.dtype,
) -> ExpertStack | None:
    """The experts of all layers for kernels that read them in place, or None where none do.

    They are cast here, once for all layers and for a backward pass that computes layers again. Only
    the Triton kernels read in place. Matrices that lie split over further axes, or that are fetched
    for the slots of a device, are gathered layer by layer, and the gathered ones are the copy that
    is read.
    """
    exchange = exchange_in_force()
    if EXPERT not in axis_sizes() or exchange.kind == "weights" or exchange.rebalance:
        return None
    specs = _specs(gate_up.shape[1:], down.shape[1:], whole_experts=True)
    further = any(axes not in (None, EXPERT) for spec in specs[:2] for axes in spec)
    if further or not _reads_sources(config):
        return None
    return lax.stop_gradient(ExpertStack(gate_up.astype(dtype), down.astype(dtype)))


def _reads_sources(config: MoEConfig) -> bool:
    """Whether the experts' implementation reads matrices where they lie (moe_kernels' Source)."""
    name = implementation(config.implementation, config.precision)
    return name == "triton" and config.precision == "compute"


def _specs(gate_up: tuple[int, ...], down: tuple[int, ...], whole_experts: bool) -> Stored:
    """How matrices of these shapes lie on the mesh, and how the stack of all layers' does."""
    sizes = axis_sizes()
    if not whole_experts:
        one = place(within_experts(GATE_UP), gate_up, sizes, "moe.gate_up")
        return Stored(one, place(within_experts(DOWN), down, sizes, "moe.down"), slots=P())
    one = place(GATE_UP, gate_up, sizes, "moe.gate_up")
    two = place(DOWN, down, sizes, "moe.down")
    stack: Any = (P(None, *one), P(None, *two), P())
    return Stored(one, two, stack=ExpertStack(*stack))


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
    travels = EXPERT in sizes and exchange.kind != "weights"
    slots = _slots(layer, config) if travels and exchange.rebalance else None
    specs = _specs(layer.gate_up.shape, layer.down.shape, whole_experts=slots is None)
    if layer.stack is None:
        specs = specs._replace(stack=None)

    def local(batch: Any, gate: Gate, experts: Stored, key: Array | None) -> Any:
        x, tokens, documents, noise = batch
        if rows:
            # Marked as each device's own, so that a custom_vjp may return its device's part of
            # their gradient. The transpose of the mark is the sum over devices.
            gate = own_copies(gate, rows)
        own = RoutingContext(tokens, key, documents, noise)
        choice = choose(x, gate, config, own)
        mixed = _mix_exchanged if travels else _mix_gathered
        out, counts = mixed(x, choice, experts, specs, config, gradient)
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
    stored = Stored(layer.gate_up, layer.down, slots, layer.stack)
    (out, experts), stats = spread(batch, layer.gate, stored, context.key)
    return out, stats._replace(experts=experts)


def _slots(layer: Layer, config: MoEConfig) -> Int[Array, "slots"]:
    """The expert in each slot. In evaluation all experts are in order, without replicas."""
    return jnp.arange(config.experts) if layer.slots is None else layer.slots


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
    assigned = Assigned(choice.plan.experts, choice.routing.weights)
    out, counts = _exchange(x, assigned, Experts(matrices), config)
    return out, choice.stats._replace(**counts)


def _mix_gathered(
    x: Float[Array, "B L D"],
    choice: Choice,
    experts: Stored,
    specs: Stored,
    config: MoEConfig,
    gradient: str,
) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
    """(layer.mix with all experts gathered to every device, no statistics).

    On the tensor axis each device has its hidden units of every expert, and outputs are summed.
    """
    gate_up, down = _gathered(experts, specs, sum_dtype(x.dtype, gradient), x.dtype)
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    out = mix(x, weights, choice.plan, gate_up, down, config)
    return _sum_over_tensor(out), {}


def _mix_exchanged(
    x: Float[Array, "B L D"],
    choice: Choice,
    experts: Stored,
    specs: Stored,
    config: MoEConfig,
    gradient: str,
) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
    """(layer.mix with experts on devices of the expert axis, statistics of the exchange)."""
    wide = sum_dtype(x.dtype, gradient)
    matrices = Matrices(*_gathered(experts, specs, wide, x.dtype, keep=(EXPERT,)))
    source = None if experts.stack is None else _source(experts.stack)
    x, weights = _on_tensor_devices((x, choice.routing.weights))
    # The plan's experts and not the router's: it has dropped what is beyond a capacity.
    places = choice.plan.experts
    if experts.slots is not None:
        # Devices begin at different replicas, so that their first tokens do not all meet.
        places = slots_of_experts(choice.plan, experts.slots, lax.axis_index(EXPERT))
    out, counts = _exchange(x, Assigned(places, weights), Experts(matrices, source), config)
    return _sum_over_tensor(out), counts


def _exchange(
    x: Float[Array, "B L D"], assigned: Assigned, experts: Experts, config: MoEConfig
) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
    """(layer.mix by the experts of all devices of the expert axis, statistics of the exchange).

    `experts` are this device's own.
    """
    sharding = Sharding(
        EXPERT,
        manual_axes()[EXPERT],
        exchange_in_force(),
        mixture_of(config),
        kernels=uses_kernels(config),
        in_place=_reads_sources(config),
    )
    tokens = x.reshape(-1, x.shape[-1])
    out, waited = expert_parallel(tokens, assigned, experts, sharding)
    counts = {
        "waited": sum_over_batch(largest(waited, (TENSOR,))),
        "busiest": _busiest(assigned.experts // len(experts.matrices.down), sharding.devices),
    }
    return out.reshape(x.shape), counts


def _busiest(device: Int[Array, "T K"], devices: int) -> Float[Array, ""]:
    """RouterStats.busiest of assignments to these devices of the expert axis."""
    device = device.reshape(-1, 1)
    rows = lax.psum(jnp.sum(device == jnp.arange(devices), axis=0), EXPERT)
    return largest(jnp.max(rows), (*BATCH, TENSOR)).astype(jnp.float32) * shared_by()


def _source(stack: ExpertStack) -> Source:
    """This device's experts of all layers, one after the other, and the layer's first one."""
    gate_up, down, layer = stack
    gate_up, down = own_copies((gate_up, down), manual_axes())
    rows = [matrices.reshape(-1, *matrices.shape[2:]) for matrices in (gate_up, down)]
    return Source(rows[0], rows[1], layer * down.shape[1])


def _gathered(
    experts: Stored,
    specs: Stored,
    gradient: jnp.dtype,
    dtype: jnp.dtype,
    keep: tuple[str, ...] = (),
) -> tuple[Array, Array]:
    """(gate_up, down) with this device's hidden units. They stay split over the axes `keep`."""
    if experts.slots is not None:
        gate_up = fetch(experts.gate_up, experts.slots, specs.gate_up, dtype, gradient)
        down = fetch(experts.down, experts.slots, specs.down, dtype, gradient, (TENSOR,))
    else:
        gate_up = gather(experts.gate_up, specs.gate_up, dtype, gradient, keep)
        down = gather(experts.down, specs.down, dtype, gradient, (*keep, TENSOR))
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
