"""The mixture-of-experts layer: a router, its bias, and the stacked experts' matrices."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import MoEConfig
from moe_jax.linear import normal_param
from moe_jax.moe import balance
from moe_jax.moe.combine import combine
from moe_jax.moe.dispatch import dispatch
from moe_jax.moe.experts import grouped_swiglu
from moe_jax.moe.plan import make_plan
from moe_jax.moe.route import Route, route
from moe_jax.parallel.mesh import DATA, data_parallel, map_over_data

IMPLEMENTATIONS = {"auto": grouped_swiglu, "reference": grouped_swiglu}
"""Expert products by `model.moe.implementation`; so far the reference is the best there is."""


class RouterBias(nnx.Variable):
    """Selection bias of a sigmoid gate: state that no optimizer touches (balance.update_bias)."""


class RouterStats(NamedTuple):
    """What a layer's routing did, over the whole batch."""

    load: Int[Array, "E"]
    """Assignments per expert."""
    dropped: Int[Array, ""]
    """Assignments that no expert computed: S minus the rows that the plan holds."""
    entropy: Float[Array, ""]
    """balance.router_entropy."""
    loss: Float[Array, ""]
    """The weighted balance losses, to be added to the objective."""
    experts: Int[Array, "B L K"] | None = None
    """Each token's experts; the training step drops them."""


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
        self.bias = RouterBias(jnp.zeros((experts,), jnp.float32))

    def __call__(self, x: Float[Array, "B L D"]) -> tuple[Float[Array, "B L D"], RouterStats]:
        gate_up, down = self.gate_up[...].astype(x.dtype), self.down[...].astype(x.dtype)
        parameters = (self.router[...], self.bias[...], gate_up, down)
        layer = map_over_data(lambda x, p: moe_layer(x, *p, config=self.config))
        (out, experts), stats = layer(x, parameters)
        return out, stats._replace(experts=experts)


def moe_layer(
    x: Float[Array, "B L D"],
    router: Float[Array, "D E"],
    bias: Float[Array, "E"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    config: MoEConfig,
) -> tuple[tuple[Float[Array, "B L D"], Int[Array, "B L K"]], RouterStats]:
    """route -> plan -> dispatch -> experts -> combine, on this device's share of the batch.

    Returns ((outputs, chosen experts), statistics over the whole batch).
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(
        tokens.astype(jnp.float32), router.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    chosen = route(logits, bias, config)
    plan = make_plan(chosen.experts, config.experts)
    rows = dispatch(tokens, plan)
    rows = IMPLEMENTATIONS[config.implementation](rows, gate_up, down, plan)
    out = combine(rows, chosen.weights, plan)
    kept = jnp.sum(plan.assignment < plan.row.size)
    stats = _stats(chosen, plan.counts, plan.row.size - kept, x.shape, config)
    return (out.reshape(x.shape), chosen.experts.reshape(*x.shape[:-1], -1)), stats


def _stats(
    chosen: Route, counts: Array, dropped: Array, shape: tuple[int, ...], config: MoEConfig
) -> RouterStats:
    """Statistics over the whole batch, also when each device holds a part of it."""
    loss = jnp.zeros((), jnp.float32)
    if config.sequence_loss:
        scores = chosen.scores.reshape(*shape[:-1], config.experts)
        loss += config.sequence_loss * balance.sequence_loss(scores, config.experts_per_token)
    if config.z_loss:
        loss += config.z_loss * balance.z_loss(chosen.logits)
    entropy = lax.stop_gradient(balance.router_entropy(chosen.scores))
    if data_parallel() > 1:
        counts, dropped = lax.psum((counts, dropped), DATA)
        entropy, loss = lax.pmean((entropy, loss), DATA)
    return RouterStats(counts, dropped, entropy, loss)
