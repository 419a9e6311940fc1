"""One update as a pure function: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

from moe_jax.base.initial import layer_keys
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import (
    Batch,
    Losses,
    Objective,
    Part,
    forward,
    losses,
    part_of,
    whole_batch,
)
from moe_jax.objectives.next_token import next_token
from moe_jax.train.state import Metrics, TrainState
from moe_jax.train.update import Gradient, make_update


def make_step(
    config: TrainConfig,
    objective: Objective = next_token,
    gradient: Callable[..., Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, batch, *operands) -> (state, metrics). Operands go to the objective.

    `gradient` is a function like make_gradient's. Unset, it is make_gradient's.
    """
    gradient = gradient or make_gradient(config, objective)
    update = make_update(config)

    def step(state: TrainState, batch: Batch, *operands: Any) -> tuple[TrainState, Metrics]:
        key = state.step_key()
        (_, parts), gradients = gradient(state.parameters, state.router, batch, key, *operands)
        updated = update(state, Gradient(gradients, optax.tree.norm(gradients), parts))
        return updated.state, updated.metrics

    return step


def make_gradient(
    config: TrainConfig,
    objective: Objective = next_token,
    merge: Callable[..., Transformer] | None = None,
) -> Callable[..., Any]:
    """(parameters, router, batch, key, *operands) -> ((total loss, Losses), gradients).

    Gradients are those of the parameters, summed over `optim.accumulation` micro-batches. Every
    loss and statistic is the whole batch's, but for the expert-level and device-level balance
    losses, which take each micro-batch's own load (moe.balance.expert_loss).

    `merge` makes the model of parameters and router biases. Unset, it is nnx.merge.
    """
    merge = merge or partial(nnx.merge, graph_of(config.model))
    length = config.data.length
    depth = config.model.mtp_depth
    parts = config.optim.accumulation

    def of_batch(
        parameters: nnx.State, router: nnx.State, batch: Batch, key: Array, *operands: Any
    ) -> Any:
        def total(parameters: nnx.State, part: Part) -> tuple[Array, Losses]:
            merged = merge(parameters, router)
            part_losses = losses(objective, forward(merged, part, length), *operands)
            return part_losses.total(config.model.mtp_weight), part_losses

        gradient = jax.value_and_grad(total, has_aux=True)
        everything = whole_batch(batch, length, depth, key)
        if parts == 1:
            return gradient(parameters, everything)
        micro = micro_batches(batch, parts)

        def of_part(batch: Batch, key: Array) -> Any:
            return gradient(parameters, part_of(everything, batch, length, key))

        def add(sums: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, of_part(*part)), None

        # The scan sums from zeros of the result's shapes, so that it compiles one part once.
        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(of_part, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.scan(add, zeros, (micro, layer_keys(key, parts)))[0]

    return of_batch


def micro_batches(batch: Batch, parts: int) -> Batch:
    """The batch in `parts` micro-batches, as a leading axis."""
    # Strided, so that every micro-batch is spread over all devices like the batch itself.
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
