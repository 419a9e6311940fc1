"""The one update: what every engine does with its gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from moe_jax.config import TrainConfig
from moe_jax.moe.balance import update_bias
from moe_jax.moe.layer import RouterStats
from moe_jax.objectives.base import Losses
from moe_jax.train.optimizer import clipped, learning_rate, make_optimizer
from moe_jax.train.state import Metrics, TrainState


class Gradient(NamedTuple):
    """The gradient of a batch with respect to `state.parameters`.

    In tiered training these are the trunk's parameters alone.
    """

    of_parameters: Any
    """A tree like state.parameters."""
    norm: Float[Array, ""]
    """The global norm. It covers parameters outside the state, too, such as experts in tiers."""
    losses: Losses


class Updated(NamedTuple):
    """The outcome of an update."""

    state: TrainState
    metrics: Metrics
    finite: Bool[Array, ""]
    """Whether the update was applied. It is skipped where loss or gradient is not finite."""


def make_update(config: TrainConfig) -> Callable[[TrainState, Gradient], Updated]:
    """Finite test -> clip by the global norm -> optimizer -> router bias -> metrics."""
    moe = config.model.moe
    optimizer = make_optimizer(config.optim, config.steps, config.continue_to)
    schedule = learning_rate(config.optim, config.steps, config.continue_to)

    def update(state: TrainState, gradient: Gradient) -> Updated:
        losses = gradient.losses
        total = losses.total(config.model.mtp_weight)
        # A norm is not finite if any element of the gradient is not, so the tree is read once.
        finite = jnp.isfinite(total) & jnp.isfinite(gradient.norm)

        own = clipped(gradient.of_parameters, gradient.norm, config.optim.clip_norm)
        changes, moments = optimizer.update(own, state.optimizer, state.parameters)
        # Towards the end the bias is frozen (arXiv:2412.19437, §4.2). Updates that were skipped
        # count as well, like the batches.
        rate = moe.bias_rate * _bias_moves(config, state.step)
        updated = (
            optax.apply_updates(state.parameters, changes),
            update_router(state.router, losses.stats, rate),
            moments,
        )
        # A select, not a branch: XLA:GPU writes the results of a branch beside the old state, which
        # takes its memory once more.
        old = (state.parameters, state.router, state.optimizer)
        parameters, router, moments = jax.tree.map(partial(jnp.where, finite), updated, old)
        new = TrainState(
            step=state.step + 1,
            updates=state.updates + finite,
            skipped=jnp.where(finite, 0, state.skipped + 1),
            parameters=parameters,
            router=router,
            optimizer=moments,
            key=state.key,
        )
        metrics = Metrics(
            loss=total,
            cross_entropy=losses.cross_entropy,
            mtp=losses.mtp,
            balance=losses.balance,
            gradient_norm=gradient.norm,
            # Of the count before the update, which is the one that the optimizer used.
            learning_rate=jnp.asarray(schedule(state.updates), jnp.float32),
            skipped=new.skipped,
            router_bias=optax.tree.norm(router, ord=jnp.inf) if losses.stats else jnp.zeros(()),
            stats=losses.stats,
            distillation=losses.distillation,
        )
        return Updated(new, metrics, finite)

    return update


def _bias_moves(config: TrainConfig, step: Array) -> Array:
    """Whether the router bias is not yet frozen, in the first `steps` or in those after them."""
    until = config.model.moe.bias_until
    moves = step < until * config.steps
    if config.continue_to:
        more = config.continue_to - config.steps
        moves |= (step >= config.steps) & (step < config.steps + until * more)
    return moves


def update_router(router: nnx.State, stats: dict[str, RouterStats], rate: Any) -> nnx.State:
    """balance.update_bias for every part of the model, by the load of the whole batch."""

    def updated(path: tuple[Any, ...], bias: Array) -> Array:
        part = str(getattr(path[0], "key", path[0]))  # "sparse" or "mtp"
        return update_bias(bias, stats[part].load, rate)

    return jax.tree_util.tree_map_with_path(updated, router)
