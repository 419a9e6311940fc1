"""The layer over many devices: each routes and computes its own share of the batch.

Exchange between devices lies above the mixture: no implementation of the experts knows of devices.
"""

from typing import Any

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from moe_jax.base.errors import require
from moe_jax.config import MoEConfig
from moe_jax.moe.layer import Choice, Gate, Layer, RouterStats, choose, mix, moe_layer
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.gather import gather, sum_dtype
from moe_jax.parallel.mesh import TENSOR, axis_sizes, batch_axes, free_axes, manual_axes
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
    if not rows and TENSOR not in sizes:
        out, choice = moe_layer(x, layer, config, context)
        return out, choice.stats
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
            gate = jax.tree.map(lambda a: lax.pcast(a, rows, to="varying"), gate)
        own = RoutingContext(tokens, key, documents, noise)
        choice = choose(x, gate, config, own)
        out = _mix_gathered(x, choice, experts, specs, config, gradient)
        # The chosen experts are rows of the batch. The other statistics are the same everywhere.
        return (out, choice.stats.experts), choice.stats._replace(experts=None)

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


# Expert parallelism is another function of this form: `experts` are this device's parts, split as
# `specs` say, and routing and plan in `choice` are over all E experts.
def _mix_gathered(
    x: Float[Array, "B L D"],
    choice: Choice,
    experts: tuple[Array, Array],
    specs: tuple[P, P],
    config: MoEConfig,
    gradient: str,
) -> Float[Array, "B L D"]:
    """layer.mix with all experts gathered to every device.

    On the tensor axis each device has its hidden units of every expert, and outputs are summed.
    """
    wide = sum_dtype(x.dtype, gradient)
    gate_up = gather(experts[0], specs[0], x.dtype, wide)
    down = gather(experts[1], specs[1], x.dtype, wide, keep=(TENSOR,))
    weights = choice.routing.weights
    if TENSOR not in manual_axes():
        return mix(x, weights, choice.plan, gate_up, down, config)
    gate_up = _own_columns(gate_up, down.shape[1])
    x, weights = (lax.pcast(a, TENSOR, to="varying") for a in (x, weights))
    return lax.psum(mix(x, weights, choice.plan, gate_up, down, config), TENSOR)


def _own_columns(gate_up: Float[Array, "E D twoF"], hidden: int) -> Float[Array, "E D columns"]:
    """This device's `hidden` columns of the gate half, and then those of the up half."""
    halves = gate_up.reshape(*gate_up.shape[:2], 2, -1)
    own = lax.dynamic_slice_in_dim(halves, lax.axis_index(TENSOR) * hidden, hidden, axis=3)
    return own.reshape(*gate_up.shape[:2], -1)
