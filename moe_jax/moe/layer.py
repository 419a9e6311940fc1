"""The mixture-of-experts layer as pure functions: choose (route -> plan), then the mixture."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.recompute import recomputed
from moe_jax.config import MoEConfig
from moe_jax.moe import balance
from moe_jax.moe.implementation import mixture_of, uses_kernels
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.route import Routing, route
from moe_jax.moe.rules import NO_CONTEXT, RoutingContext, expert_capacity
from moe_jax.parallel.mesh import shared_by, sum_over_batch


class RouterStats(NamedTuple):
    """Statistics of a layer's routing over the tokens of all devices that belong to a document."""

    load: Int[Array, "E"]
    """Assignments that the gate made to each expert."""
    dropped: Int[Array, ""]
    """Assignments that were not computed, because their expert was at its capacity."""
    entropy: Float[Array, ""]
    """balance.router_entropy."""
    loss: Float[Array, ""]
    """The weighted balance losses, to be added to the objective."""
    waited: Int[Array, ""]
    """Copies of tokens that did not fit the exchange's buffer and were sent in a further round."""
    busiest: Float[Array, ""]
    """Assignments that the devices would compute if each had as many as the one with the most. 0:
    tokens do not travel."""
    experts: Int[Array, "B L K"] | None = None
    """Each token's experts, E for no expert. Objectives drop them, because the statistics of a step
    would keep them in memory."""


class Gate(NamedTuple):
    """The router's arrays of one layer."""

    router: Float[Array, "D E"]
    bias: Float[Array, "E"]
    noise: Float[Array, "D E"] | None = None
    """Noisy top-k's second router."""


class ExpertStack(NamedTuple):
    """The experts of all layers of a scan, from which kernels read one layer's in place.

    They are in the compute dtype and have no gradient. The layer's own matrices receive it.
    """

    gate_up: Float[Array, "layers E D twoF"]
    down: Float[Array, "layers E F D"]
    layer: Int[Array, ""] | int = 0
    """The layer that is computed."""


class Layer(NamedTuple):
    """The arrays of one layer."""

    gate: Gate
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    slots: Int[Array, "slots"] | None = None
    """The expert in each slot of the devices (module.ExpertSlots)."""
    stack: ExpertStack | None = None
    """Set where kernels read the experts here, and not in gate_up and down."""


class Choice(NamedTuple):
    """The results of a layer before its experts run: which expert computes what, and the weights.

    Tiers fetch experts by it.
    """

    routing: Routing
    plan: Plan
    stats: RouterStats


def moe_layer(
    x: Float[Array, "B L D"],
    layer: Layer,
    config: MoEConfig,
    context: RoutingContext = NO_CONTEXT,
) -> tuple[Float[Array, "B L D"], Choice]:
    """y[t] = sum_k weight[t, k] · expert_k(x[t]), on this device's share of the batch."""
    choice = choose(x, layer.gate, config, context)
    return mix(x, choice.routing.weights, choice.plan, layer.gate_up, layer.down, config), choice


def choose(
    x: Float[Array, "B L D"], gate: Gate, config: MoEConfig, context: RoutingContext = NO_CONTEXT
) -> Choice:
    """The router's decision for every token, its plan, and the statistics of both."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = project(tokens, gate.router)
    spread = None if gate.noise is None else project(tokens, gate.noise)
    kernels = uses_kernels(config)
    routing = route(logits, gate.bias, config, context, spread, kernels=kernels)
    # 0 is dropless. Expert choice has a capacity by definition, of factor 1 unless another is set.
    factor = config.capacity_factor
    if config.rule == "expert_choice":
        factor = factor or 1.0
    # Of the whole batch's tokens, so that what is dropped does not depend on the layout.
    tokens_of_all = len(tokens) * shared_by()
    capacity = expert_capacity(tokens_of_all, config, factor) if factor else None
    plan = make_plan(routing.experts, config.experts, capacity, kernels=kernels)
    shape = x.shape[:-1]
    return Choice(routing, plan, router_stats(routing, plan, shape, config, context.documents))


def mix(
    x: Float[Array, "B L D"],
    weights: Float[Array, "T K"],
    plan: Plan,
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    config: MoEConfig,
) -> Float[Array, "B L D"]:
    """The weighted sum of the chosen experts' outputs, by the configured implementation.

    Matrices are cast to the dtype of x.
    """
    tokens = x.reshape(-1, x.shape[-1])
    gate_up = gate_up.astype(x.dtype)
    down = down.astype(x.dtype)
    return mixture_of(config)(tokens, weights, gate_up, down, plan).reshape(x.shape)


@recomputed  # otherwise the tokens would be kept in float32
def project(tokens: Float[Array, "T D"], matrix: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Router outputs, in float32 whatever the dtypes of the operands (arXiv:2101.03961, §2.4)."""
    tokens = tokens.astype(jnp.float32)
    # HIGHEST: a GPU's default (TF32) rounds logits enough to change who is chosen.
    return jnp.matmul(tokens, matrix.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def router_stats(
    routing: Routing,
    plan: Plan,
    shape: tuple[int, ...],
    config: MoEConfig,
    documents: Int[Array, "B L"] | None = None,
) -> RouterStats:
    """Statistics over all devices' tokens. `shape` is [B, L]. `documents`: see RoutingContext.

    Means are over the tokens that belong to a document.
    """
    loss = balance_losses(routing, plan, shape, config, documents)
    counted = None if documents is None else documents.reshape(-1) != 0
    # A statistic and no loss: without the stop its gradient would be computed and thrown away.
    scores = lax.stop_gradient(routing.scores)
    dropped = jnp.sum(plan.load - plan.counts)
    return RouterStats(
        load=sum_over_batch(plan.load),
        dropped=sum_over_batch(dropped),
        entropy=balance.router_entropy(scores, counted),
        loss=loss,
        waited=jnp.zeros((), jnp.int32),
        busiest=jnp.zeros((), jnp.float32),
        experts=routing.experts.reshape(*shape, -1),
    )


def balance_losses(
    routing: Routing,
    plan: Plan,
    shape: tuple[int, ...],
    config: MoEConfig,
    documents: Int[Array, "B L"] | None = None,
) -> Float[Array, ""]:
    """The weighted sum of the configured balance losses. The arguments are router_stats'."""
    counted = None if documents is None else documents != 0
    of_tokens = None if counted is None else counted.reshape(-1)
    scores = routing.scores.reshape(*shape, config.experts)
    loss = jnp.zeros((), jnp.float32)
    if config.sequence_loss:
        per_token = config.experts_per_token
        loss += config.sequence_loss * balance.sequence_loss(scores, per_token, counted)
    for weight, groups in ((config.expert_loss, None), (config.device_loss, config.groups)):
        if weight:
            loss += weight * balance.expert_loss(routing.scores, plan.load, groups, of_tokens)
    if config.locality_loss:
        chosen = routing.experts.reshape(*shape, -1)  # [B, L, K]
        loss += config.locality_loss * balance.locality_loss(scores, chosen, documents=documents)
    if config.z_loss:
        loss += config.z_loss * balance.z_loss(routing.logits, of_tokens)
    return loss
