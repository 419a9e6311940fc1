"""The mixture-of-experts layer: a router, its bias, and the stacked experts' matrices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int
from moe_kernels import experts as triton_experts
from moe_kernels import experts_fp8 as triton_experts_fp8
from moe_kernels.launch import fp8_support, triton_support

from moe_jax.config import MoEConfig
from moe_jax.model.linear import normal_param
from moe_jax.moe import balance, reference, xla
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.precision import FP8
from moe_jax.moe.route import Routing, route
from moe_jax.moe.rules import NO_CONTEXT, RoutingContext, expert_capacity
from moe_jax.parallel.mesh import DATA, data_parallel, map_over_data

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.mixture,
    "xla": xla.mixture,
    "triton": triton_experts.mixture,
}
"""(x, weights, gate_up, down, plan) -> outputs, by `model.moe.implementation`."""


def implementation(name: str, precision: str = "compute") -> str:
    """`auto` is triton on GPUs that it can run on (compute capability 8.0; 8.9 for precision fp8),
    xla anywhere else."""
    if name != "auto":
        return name
    support = fp8_support() if precision == "fp8" else triton_support()
    return "triton" if support.name in ("gpu", "lower") else "xla"


def mixture_of(config: MoEConfig) -> Callable[..., Array]:
    """The implementation that the settings ask for, in the precision that they ask for."""
    name = implementation(config.implementation, config.precision)
    if config.precision == "compute":
        return IMPLEMENTATIONS[name]
    if name == "triton":
        return partial(triton_experts_fp8.mixture, power_of_two=config.fp8_scales == "power_of_two")
    return partial(xla.mixture, rounding=FP8[config.fp8_scales])


class RouterBias(nnx.Variable):
    """Selection bias of a sigmoid gate: state that no optimizer touches (balance.update_bias)."""


class RouterStats(NamedTuple):
    """What a layer's routing did, over the whole batch."""

    load: Int[Array, "E"]
    """Assignments that the gate made to each expert."""
    dropped: Int[Array, ""]
    """Assignments that no expert computed, because it was at its capacity."""
    entropy: Float[Array, ""]
    """balance.router_entropy."""
    loss: Float[Array, ""]
    """The weighted balance losses, to be added to the objective."""
    experts: Int[Array, "B L K"] | None = None
    """Each token's experts, E for nobody; the training step drops them."""


class MoE(nnx.Module):
    """y[t] = sum_k weight[t, k] · expert_k(x[t]) over the K experts that the gate chooses.

    The router computes in float32 whatever the dtype of x (arXiv:2101.03961, §2.4).
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        std: float,
        out_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        experts, hidden = config.experts, config.expert_hidden
        self.config = config
        self.router = normal_param(rngs.params(), (width, experts), std, dtype)
        self.gate_up = normal_param(rngs.params(), (experts, width, 2 * hidden), std, dtype)
        self.down = normal_param(rngs.params(), (experts, hidden, width), out_std, dtype)
        if config.rule == "noisy_top_k":
            self.router_noise = nnx.Param(jnp.zeros((width, experts), dtype))
        self.bias = RouterBias(jnp.zeros((experts,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: RoutingContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B L D"], RouterStats]:
        noisy = self.config.rule == "noisy_top_k"
        parameters = Parameters(
            self.router[...],
            self.bias[...],
            self.gate_up[...].astype(x.dtype),
            self.down[...].astype(x.dtype),
            self.router_noise[...] if noisy else None,
        )

        def run(batch: tuple[Array, Array | None], shared: tuple[Parameters, Array | None]) -> Any:
            parameters, key = shared
            if key is not None and data_parallel() > 1:
                key = jax.random.fold_in(key, lax.axis_index(DATA))
            return moe_layer(batch[0], parameters, self.config, RoutingContext(batch[1], key))

        (out, experts), stats = map_over_data(run)((x, context.tokens), (parameters, context.key))
        return out, stats._replace(experts=experts)


class Parameters(NamedTuple):
    """The arrays of one layer."""

    router: Float[Array, "D E"]
    bias: Float[Array, "E"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    router_noise: Float[Array, "D E"] | None = None


def moe_layer(
    x: Float[Array, "B L D"],
    parameters: Parameters,
    config: MoEConfig,
    context: RoutingContext = NO_CONTEXT,
) -> tuple[tuple[Float[Array, "B L D"], Int[Array, "B L K"]], RouterStats]:
    """route -> plan -> (dispatch -> experts -> combine), on this device's share of the batch.

    Returns ((outputs, chosen experts), statistics over the whole batch).
    """
    tokens = x.reshape(-1, x.shape[-1])
    router, noise = parameters.router, parameters.router_noise
    chosen, plan = choose(tokens, router, parameters.bias, noise, config, context)
    mixture = mixture_of(config)
    out = mixture(tokens, chosen.weights, parameters.gate_up, parameters.down, plan)
    stats = router_stats(chosen, plan, x.shape, config)
    return (out.reshape(x.shape), chosen.experts.reshape(*x.shape[:-1], -1)), stats


def choose(
    tokens: Float[Array, "T D"],
    router: Float[Array, "D E"],
    bias: Float[Array, "E"],
    noise: Float[Array, "D E"] | None,
    config: MoEConfig,
    context: RoutingContext = NO_CONTEXT,
) -> tuple[Routing, Plan]:
    """Everything of the layer that needs no expert: who computes what, and with what weight."""
    logits = project(tokens, router)
    spread = None if noise is None else project(tokens, noise)
    kernels = implementation(config.implementation, config.precision) == "triton"
    chosen = route(logits, bias, config, context, spread, kernels=kernels)
    factor = config.capacity_factor
    if config.rule == "expert_choice":
        factor = factor or 1.0
    capacity = expert_capacity(len(tokens), config, factor) if factor else None
    return chosen, make_plan(chosen.experts, config.experts, capacity, kernels=kernels)


def project(tokens: Array, matrix: Array) -> Array:
    """Router outputs, in float32 whatever the dtypes."""
    tokens, matrix = tokens.astype(jnp.float32), matrix.astype(jnp.float32)
    return jnp.matmul(tokens, matrix, precision=lax.Precision.HIGHEST)


def router_stats(
    chosen: Routing, plan: Plan, shape: tuple[int, ...], config: MoEConfig
) -> RouterStats:
    """Statistics over the whole batch, also when each device holds a part of it."""
    loss = jnp.zeros((), jnp.float32)
    if config.sequence_loss:
        scores = chosen.scores.reshape(*shape[:-1], config.experts)
        loss += config.sequence_loss * balance.sequence_loss(scores, config.experts_per_token)
    if config.expert_loss:
        loss += config.expert_loss * balance.expert_loss(chosen.scores, plan.load)
    if config.device_loss:
        loss += config.device_loss * balance.expert_loss(chosen.scores, plan.load, config.groups)
    if config.locality_loss:
        scores, picks = (a.reshape(*shape[:-1], -1) for a in (chosen.scores, chosen.experts))
        loss += config.locality_loss * balance.locality_loss(scores, picks)
    if config.z_loss:
        loss += config.z_loss * balance.z_loss(chosen.logits)
    entropy = lax.stop_gradient(balance.router_entropy(chosen.scores))
    load, dropped = plan.load, jnp.sum(plan.load - plan.counts)
    if data_parallel() > 1:
        load, dropped = lax.psum((load, dropped), DATA)
        entropy, loss = lax.pmean((entropy, loss), DATA)
    return RouterStats(load, dropped, entropy, loss)
