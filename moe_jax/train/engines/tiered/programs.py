"""The model's stages (model/stages.py) and their gradients, each a program compiled once.

Between enter and leave of a sparse block the host brings its experts. The backward pass takes the
router's choice as data and never decides again. It recomputes the forward part of the mixture from
the experts' matrices, so that no residual holds an expert.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.config import PlacementConfig, TrainConfig
from moe_jax.model import stages
from moe_jax.model.abstract import abstract_block, graph_of, split_model
from moe_jax.model.stages import REMAT_POLICIES, Context, Entered
from moe_jax.model.trunk import (
    EXPERT,
    SPARSE_BLOCKS,
    Matrices,
    join_blocks,
    split_blocks,
    with_experts,
)
from moe_jax.moe.layer import RouterStats, mix
from moe_jax.moe.plan import Plan
from moe_jax.objectives.base import (
    Batch,
    Losses,
    Objective,
    Reading,
    balance_loss,
    losses,
    whole_batch,
)
from moe_jax.objectives.next_token import batch_nats
from moe_jax.train.state import TrainState
from moe_jax.train.update import Gradient, Updated, make_update


class Chosen(NamedTuple):
    """A sparse block before its experts, and its router's decision."""

    entered: Entered
    weights: Float[Array, "T K"]
    plan: Plan
    stats: RouterStats


def without_stream(chosen: Chosen) -> Chosen:
    """What the backward pass needs: the residual stream passes through a block by addition, so its
    values play no part in any gradient."""
    return chosen._replace(entered=chosen.entered._replace(x=None))


class Ended(NamedTuple):
    """The loss, and its gradient at the end of the blocks."""

    losses: Losses
    """Without the statistics of the sparse blocks."""
    outside: Any
    """Gradient of the trunk's parameters outside the sparse blocks, through the last stage alone.
    The part through the first stage is added by `finish`: a tied embedding is used by both."""
    x: Float[Array, "B L D"]


class BlockGradient(NamedTuple):
    """The gradient of one sparse block."""

    parameters: Any
    x: Float[Array, "B L D"]
    experts: Matrices
    """[E, …]: 0 for experts that no token chose."""
    square: Float[Array, ""]
    """Sum of the squares of `experts`."""


class Weights(NamedTuple):
    """The part of the state that every stage takes."""

    trunk: nnx.State
    router: nnx.State


class Inputs(NamedTuple):
    """The arguments of a stage that belong to the batch. `key` is None outside training."""

    batch: Batch
    key: Array | None


class Model:
    """Builds the modules that stages take from a config's parameters. Their experts stay empty."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config.model
        self.length = config.data.length
        self._graph = graph_of(self.config)
        self._block_graph = split_model(abstract_block(self.config))[0]

    def whole(self, weights: Weights) -> Any:
        """The whole model."""
        # The leading axis alone, because nnx.merge checks the tree and not the shapes.
        empty = jnp.zeros((self.config.moe_layers, 0))
        trunk = with_experts(weights.trunk, (empty, empty))
        return nnx.merge(self._graph, trunk, weights.router)

    def block(self, parameters: nnx.State, router: nnx.State, layer: Array) -> Any:
        """The sparse block `layer`, given its parameters and the router biases of all."""
        flat = list(nnx.to_flat_state(parameters))
        flat += [(("moe", name), nnx.Param(jnp.zeros(0))) for name in EXPERT]
        biases: Any = router
        for name in SPARSE_BLOCKS:
            biases = biases[name]
        bias = jax.tree.map(lambda leaf: leaf[layer], biases)
        return nnx.merge(self._block_graph, nnx.from_flat_state(flat), bias)

    def context(self, inputs: Inputs, layer: Array | None = None) -> Context:
        """Of the whole model, or of a sparse block."""
        tokens = inputs.batch["tokens"][:, : self.length]
        segments = inputs.batch["segments"][:, : self.length]
        context = stages.whole_documents(self.config, tokens, segments, inputs.key)
        # The same path as in stages.run_stack, so the same draws as in ordinary training.
        return context if layer is None else context.at("sparse", layer)


class Programs:
    """The jitted programs of one config and objective."""

    def __init__(self, config: TrainConfig, objective: Objective) -> None:
        model = Model(config)
        self.begin = jax.jit(partial(_begin, model))
        """(Weights, Inputs) -> (x, its pullback)"""
        self.begin_only = jax.jit(lambda *given: _begin(model, *given)[0])
        """(Weights, Inputs) -> x"""
        self.begin_back = jax.jit(lambda pull, d_x: pull(d_x)[0])
        """(pullback, d x) -> gradient of the trunk outside the sparse blocks"""
        self.enter = jax.jit(partial(_enter, model))
        """(Weights, layer, x, Inputs) -> (Chosen, its pullback)"""
        self.enter_only = jax.jit(lambda *given: _enter(model, *given)[0])
        """(Weights, layer, x, Inputs) -> Chosen"""
        self.leave = jax.jit(partial(_leave, model))
        """(Weights, layer, Chosen, Inputs, experts) -> x"""
        self.end = jax.jit(partial(_end, model, config, objective))
        """(Weights, x, Inputs) -> Ended"""
        self.back = jax.jit(partial(_back, model))
        """(Weights, layer, Chosen, Inputs, experts, (pullback of enter, d x)) -> BlockGradient"""
        self.nats = jax.jit(lambda weights, x, batch: batch_nats(model.whole(weights), x, batch))
        """(Weights, x, batch) -> sum of -log p"""
        self.finish = jax.jit(make_finish(config), donate_argnums=0)
        """(state, Ended, gradient outside by way of begin, BlockParts of all layers) -> Updated"""


def programs_of(config: TrainConfig, objective: Objective) -> Programs:
    """The programs of a config, shared by all runs that differ only in their placement."""
    return _programs(replace(config, placement=PlacementConfig(), out=""), objective)


@lru_cache(maxsize=4)
def _programs(config: TrainConfig, objective: Objective) -> Programs:
    return Programs(config, objective)


def _begin(model: Model, weights: Weights, inputs: Inputs) -> tuple[Array, Any]:
    outside, blocks = split_blocks(weights.trunk)

    def run(outside: nnx.State) -> Array:
        whole = model.whole(weights._replace(trunk=join_blocks(outside, blocks)))
        return whole.begin(model.context(inputs))[0]

    return jax.vjp(run, outside)


def _enter(
    model: Model, weights: Weights, layer: Array, x: Array, inputs: Inputs
) -> tuple[Chosen, Any]:
    context = model.context(inputs, layer)

    def attend(parameters: nnx.State, x: Array) -> Entered:
        block = model.block(parameters, weights.router, layer)
        return stages.enter(block, x, context)[0]

    if model.config.remat != "none":
        # The router stays outside, because the backward pass must not decide again.
        attend = jax.checkpoint(attend, policy=REMAT_POLICIES[model.config.remat])

    def run(parameters: nnx.State, x: Array) -> Any:
        entered = attend(parameters, x)
        block = model.block(parameters, weights.router, layer)
        routing, plan, stats = stages.choose(block, entered.normed, context)
        return (entered, routing.weights, stats.loss), (plan, stats)

    parameters = _slice(split_blocks(weights.trunk)[1], layer)
    (entered, gate_weights, _), pull, (plan, stats) = jax.vjp(run, parameters, x, has_aux=True)
    return Chosen(entered, gate_weights, plan, stats._replace(experts=None)), pull


def _leave(
    model: Model, weights: Weights, layer: Array, chosen: Chosen, inputs: Inputs, experts: Matrices
) -> Array:
    key = model.context(inputs, layer).key
    run = _second_half(model, weights.router, layer, chosen.plan, key)
    parameters = _slice(split_blocks(weights.trunk)[1], layer)
    return run(chosen.entered, parameters, chosen.weights, experts)


def _second_half(
    model: Model, router: nnx.State, layer: Array, plan: Plan, key: Array | None
) -> Callable[[Entered, nnx.State, Array, Matrices], Array]:
    """(Entered, block parameters, gate weights, experts) -> the block's output"""

    def run(entered: Entered, parameters: nnx.State, weights: Array, experts: Matrices) -> Array:
        down, gate_up = experts
        routed = mix(entered.normed, weights, plan, gate_up, down, model.config.moe)
        return stages.leave(model.block(parameters, router, layer), entered, routed, key)

    return run


def _end(
    model: Model,
    config: TrainConfig,
    objective: Objective,
    weights: Weights,
    x: Array,
    inputs: Inputs,
) -> Ended:
    outside, blocks = split_blocks(weights.trunk)
    part = whole_batch(inputs.batch, model.length, model.config.mtp_depth, inputs.key)

    def total(outside: nnx.State, x: Array) -> tuple[Array, Losses]:
        whole = model.whole(weights._replace(trunk=join_blocks(outside, blocks)))
        reading = Reading(whole, part, model.length, hidden=x, stats=None)
        parts = losses(objective, reading)
        return parts.total(config.model.mtp_weight), parts

    (_, parts), (d_outside, d_x) = jax.value_and_grad(total, (0, 1), has_aux=True)(outside, x)
    return Ended(parts, d_outside, d_x)


# partial() binds `model`. The program takes six arguments.
def _back(  # noqa: PLR0917
    model: Model,
    weights: Weights,
    layer: Array,
    chosen: Chosen,
    inputs: Inputs,
    experts: Matrices,
    above: tuple[Any, Array],
) -> BlockGradient:
    pull, d_x = above
    parameters = _slice(split_blocks(weights.trunk)[1], layer)
    key = model.context(inputs, layer).key
    run = _second_half(model, weights.router, layer, chosen.plan, key)
    # Any values do for x (without_stream): it is only added to.
    entered = chosen.entered._replace(x=jnp.zeros_like(d_x))
    pull_second = jax.vjp(run, entered, parameters, chosen.weights, experts)[1]
    d_entered, second, d_weights, d_experts = pull_second(d_x)
    # 1 is the cotangent of the balance losses, which are added to the objective as they are.
    first, d_x = pull((d_entered, d_weights, jnp.ones((), jnp.float32)))
    # Exactly 0 for experts without a token, whatever an implementation computes there: their rows
    # of the buffer may be stale.
    used = (chosen.stats.load > 0)[:, None, None]
    d_experts = tuple(jnp.where(used, gradient, 0) for gradient in d_experts)
    return BlockGradient(jax.tree.map(jnp.add, second, first), d_x, d_experts, _square(d_experts))


def _square(tree: Any) -> Array:
    """Sum of squares: its root is optax.tree.norm."""
    return optax.tree.norm(tree, squared=True)


def _slice(blocks: nnx.State, layer: Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[layer], blocks)


class BlockParts(NamedTuple):
    """The part of the gradient and of the statistics that `finish` takes from one sparse block."""

    gradient: Any
    square: Float[Array, ""]
    """Of the experts' gradients."""
    stats: RouterStats


def make_finish(config: TrainConfig) -> Callable[..., Updated]:
    """The trunk's update, from all parts of the gradient."""
    update = make_update(config)

    def finish(
        state: TrainState, ended: Ended, begun: nnx.State, blocks: tuple[BlockParts, ...]
    ) -> Updated:
        stacked: Any = jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)
        gradients = join_blocks(jax.tree.map(jnp.add, ended.outside, begun), stacked.gradient)
        # Over trunk and experts: clipping is by the norm of the whole gradient.
        norm = jnp.sqrt(_square(gradients) + stacked.square.sum())
        stats = {"sparse": stacked.stats} | ended.losses.stats
        all_losses = ended.losses._replace(balance=balance_loss(stats), stats=stats)
        return update(state, Gradient(gradients, norm, all_losses))

    return finish
