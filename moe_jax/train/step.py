"""One update as a pure function: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.model.transformer import Transformer
from moe_jax.moe.balance import update_bias
from moe_jax.moe.layer import RouterBias, RouterStats
from moe_jax.objectives.next_token import Batch, Losses, losses, valid_targets
from moe_jax.train.optimizer import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """Everything that an update changes."""

    step: Int[Array, ""]
    """Updates tried, skipped ones included; the next batch is number `step`."""
    updates: Int[Array, ""]
    """Updates done; the learning rate follows this count."""
    skipped: Int[Array, ""]
    """Updates skipped in a row, up to now, because loss or gradient was not finite."""
    parameters: nnx.State
    router: nnx.State
    """The RouterBias variables."""
    optimizer: optax.OptState
    key: Array
    """Random key data (uint32[2]) that sampling, and routing rules that draw, start from."""


class Metrics(NamedTuple):
    """What one update reports."""

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    router_bias: Float[Array, ""]
    """Largest absolute router bias after the update."""
    stats: dict[str, RouterStats]
    distillation: Float[Array, ""] | None = None


def graph_of(config: ModelConfig) -> nnx.GraphDef:
    """The model's static part, made without memory."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, RouterBias)[0]


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first update; a pure function of the config (jit it with shardings)."""
    model_key, sample_key = jax.random.split(jax.random.key(config.seed))
    model = Transformer(config.resolved_model(), rngs=nnx.Rngs(params=model_key))
    _, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    optimizer = make_optimizer(config.optim, config.steps).init(parameters)
    zero = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(sample_key)
    return TrainState(zero, zero, zero, parameters, router, optimizer, key)


Objective = Callable[..., Losses]
"""(model, batch, length, normalisers, key, *more) -> Losses, as objective.losses."""


def make_step(
    config: TrainConfig, objective: Objective = losses
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update function of a config: gradient, clip, optimizer, router bias.

    `more` arguments of a step go to the objective (a teacher's parameters, train.distillation).
    """
    model = config.resolved_model()
    graph = graph_of(model)
    optimizer = make_optimizer(config.optim, config.steps)
    schedule = learning_rate(config.optim, config.steps)
    gradient = make_gradient(config, graph, objective)

    def step(state: TrainState, batch: Batch, *more: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (total, parts), gradients = gradient(state.parameters, state.router, batch, key, *more)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def update(_: None) -> tuple[Any, Any, Any]:
            updates, moments = optimizer.update(gradients, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, updates)
            rate = model.moe.bias_rate * (state.step < model.moe.bias_until * config.steps)
            return parameters, update_router(state.router, parts.stats, rate), moments

        def keep(_: None) -> tuple[Any, Any, Any]:
            return state.parameters, state.router, state.optimizer

        parameters, router, moments = lax.cond(finite, update, keep, None)
        skipped = jnp.where(finite, 0, state.skipped + 1)
        updates = state.updates + finite
        new = TrainState(state.step + 1, updates, skipped, parameters, router, moments, state.key)
        rate = jnp.asarray(schedule(state.updates), jnp.float32)
        metrics = Metrics(
            total,
            parts.cross_entropy,
            parts.mtp,
            parts.balance,
            norm,
            rate,
            skipped,
            optax.tree.norm(router, ord=jnp.inf) if parts.stats else jnp.zeros(()),
            parts.stats,
            parts.distillation,
        )
        return new, metrics

    return step


def make_gradient(
    config: TrainConfig, graph: nnx.GraphDef, objective: Objective = losses
) -> Callable[..., Any]:
    """((total loss, Losses), gradients) of a batch, over `optim.accumulation` micro-batches."""
    length, weight = config.data.length, config.model.mtp_weight
    depth, parts = config.model.mtp_depth, config.optim.accumulation

    def whole(parameters: Any, router: Any, batch: Batch, key: Array, *more: Any) -> Any:
        def total(
            parameters: Any, router: Any, batch: Batch, normalisers: list[Array], key: Array
        ) -> Any:
            model = nnx.merge(graph, parameters, router)
            found = objective(model, batch, length, normalisers, key, *more)
            found = found._replace(balance=found.balance / parts)
            main = found.cross_entropy if found.distillation is None else found.distillation
            return main + weight * found.mtp + found.balance, found

        gradient = jax.value_and_grad(total, has_aux=True)
        normalisers = [valid_targets(batch, length, k + 1) for k in range(depth + 1)]
        if parts == 1:
            return gradient(parameters, router, batch, normalisers, key)
        # Strided, so that every micro-batch is spread over all devices like the batch itself.
        micro = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

        def add(sums: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            found = gradient(parameters, router, part[0], normalisers, part[1])
            return jax.tree.map(jnp.add, sums, found), None

        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(gradient, parameters, router, first, normalisers, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (value, found), gradients = lax.scan(add, zeros, (micro, jax.random.split(key, parts)))[0]
        return (value, _averaged(found, parts)), gradients

    return whole


def _averaged(found: Losses, parts: int) -> Losses:
    """Loads and drops of micro-batches add up; entropies and balance losses are averaged."""
    stats = {
        name: part._replace(entropy=part.entropy / parts, loss=part.loss / parts)
        for name, part in found.stats.items()
    }
    return found._replace(stats=stats)


def update_router(router: nnx.State, stats: dict[str, RouterStats], rate: Any) -> nnx.State:
    """balance.update_bias for every part of the model, by the load of the whole batch."""

    def updated(path: tuple[Any, ...], bias: Array) -> Array:
        part = str(getattr(path[0], "key", path[0]))
        return update_bias(bias, stats[part].load, rate)

    return jax.tree_util.tree_map_with_path(updated, router)


def abstract_state(config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state, without memory."""
    return jax.eval_shape(lambda: init_state(config))


def state_bytes(config: TrainConfig) -> int:
    """Bytes of parameters, router and optimizer state."""
    leaves = jax.tree.leaves(abstract_state(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
