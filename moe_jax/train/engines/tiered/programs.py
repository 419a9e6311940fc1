"""The programs between which the host brings experts; each is compiled once for all layers.

begin (embedding, dense blocks), enter (a sparse block up to its experts), leave (its experts and
the rest of it), end (the loss), and their gradients. What `enter` chose is data for the backward
pass, never decided again; that pass computes the mixture's forward part anew from the chosen
experts' matrices, so that no residual holds an expert.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from moe_jax.config import PlacementConfig, TrainConfig
from moe_jax.data.batches import shifted_targets
from moe_jax.model.attention import AttentionContext, document_context
from moe_jax.model.block import REMAT_POLICIES, Block
from moe_jax.moe.layer import RouterBias, RouterStats, choose, mixture_of, router_stats
from moe_jax.moe.plan import Plan
from moe_jax.moe.rules import RoutingContext
from moe_jax.objectives.next_token import Batch, Losses, read_out, token_nats, valid_targets
from moe_jax.train.engines.tiered.trunk import EXPERT, Matrices, with_experts
from moe_jax.train.optimizer import clipped, learning_rate, make_optimizer
from moe_jax.train.step import Metrics, TrainState, graph_of, update_router

BLOCKS = ("sparse", "blocks")


class Entered(NamedTuple):
    """A sparse block before its experts."""

    normed: Float[Array, "B L D"]
    weights: Float[Array, "T K"]
    plan: Plan
    stats: RouterStats


class Ended(NamedTuple):
    """The loss and its gradient at the end of the blocks."""

    parts: Losses
    rest: Any
    """Gradient of the trunk's parameters outside the sparse blocks, by way of the read-out."""
    x: Float[Array, "B L D"]


class Backed(NamedTuple):
    """The gradient of one sparse block."""

    block: Any
    x: Float[Array, "B L D"]
    experts: Matrices
    """[E, …]; 0 for experts that no token chose."""
    square: Float[Array, ""]
    """Sum of the squares of `experts`."""


class Model:
    """The model cut at its experts, for one config."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.length = config.resolved_model(), config.data.length
        self._graph = graph_of(self.config)
        block = nnx.eval_shape(lambda: Block(self.config, sparse=True, rngs=nnx.Rngs(0)))
        self._block_graph = nnx.split(block, nnx.Param, RouterBias)[0]

    def whole(self, trunk: nnx.State, router: Any) -> Any:
        """The model as an object whose experts are empty arrays."""
        empty = jnp.zeros((self.config.moe_layers, 0))
        return nnx.merge(self._graph, with_experts(trunk, (empty, empty)), router)

    def block(self, parameters: nnx.State, router: Any, layer: Array) -> Any:
        """A sparse block as an object whose experts are empty arrays."""
        flat = list(nnx.to_flat_state(parameters))
        flat += [(("moe", name), nnx.Param(jnp.zeros(0))) for name in EXPERT]
        bias = jax.tree.map(lambda leaf: leaf[layer], router["sparse"]["blocks"])
        return nnx.merge(self._block_graph, nnx.from_flat_state(flat), bias)

    def attention(self, batch: Batch) -> AttentionContext:
        return document_context(self.config, batch["segments"][:, : self.length])

    def context(
        self, batch: Batch, key: Array | None, layer: Array | None = None
    ) -> RoutingContext:
        """What objective.losses, and the sparse stack within, give to their parts."""
        if key is not None:
            key = jax.random.split(key)[0]
            if layer is not None:
                key = jax.random.split(key, self.config.moe_layers)[layer]
        return RoutingContext(batch["tokens"][:, : self.length], key)


def split_blocks(trunk: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(everything outside the sparse blocks, the blocks)"""
    flat = list(nnx.to_flat_state(trunk))
    inside = [(path[2:], leaf) for path, leaf in flat if path[:2] == BLOCKS]
    outside = [(path, leaf) for path, leaf in flat if path[:2] != BLOCKS]
    return nnx.from_flat_state(outside), nnx.from_flat_state(inside)


def join_blocks(rest: nnx.State, blocks: nnx.State) -> nnx.State:
    """The inverse of split_blocks."""
    flat = list(nnx.to_flat_state(rest))
    flat += [((*BLOCKS, *path), leaf) for path, leaf in nnx.to_flat_state(blocks)]
    return nnx.from_flat_state(flat)


class Programs:
    """The jitted programs of one config. `key` is that of the update, None outside training."""

    def __init__(self, config: TrainConfig) -> None:
        model = Model(config)
        self.key = jax.jit(
            lambda state: jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        )
        """state -> key"""
        self.begin = jax.jit(partial(_begin, model))
        """(trunk, router, batch, key) -> (x, its pullback)"""
        self.begin_only = jax.jit(
            lambda trunk, router, batch: _begin(model, trunk, router, batch, None)[0]
        )
        """(trunk, router, batch) -> x"""
        self.begin_back = jax.jit(lambda pull, d_x: pull(d_x)[0])
        """(pullback, d x) -> gradient of the trunk outside the sparse blocks"""
        self.enter = jax.jit(partial(_enter, model))
        """(trunk, router, layer, x, batch, key) -> ((x, Entered), pullback)"""
        self.enter_only = jax.jit(
            lambda trunk, router, layer, x, batch: _enter(
                model, trunk, router, layer, x, batch, None
            )[0]
        )
        """(trunk, router, layer, x, batch) -> (x, Entered)"""
        self.leave = jax.jit(partial(_leave, model))
        """(trunk, router, layer, x, Entered, batch, key, slab) -> x"""
        self.end = jax.jit(partial(_end, model))
        """(trunk, router, x, batch, key) -> Ended"""
        self.back = jax.jit(partial(_back, model))
        """(trunk, router, layer, Entered, batch, key, slab, pullback of enter, d x) -> Backed"""
        self.nats = jax.jit(partial(_nats, model))
        """(trunk, router, x, batch) -> sum of -log p"""
        self.finish = jax.jit(make_finish(config), donate_argnums=0)
        """(state, Ended, gradients outside the blocks, of the blocks, squares, stats) -> (state,
        Metrics, whether the update was finite)"""


def programs_of(config: TrainConfig) -> Programs:
    """The programs of a config, shared by all runs that differ in where experts live alone."""
    return _programs(replace(config, placement=PlacementConfig(), out=""))


@lru_cache(maxsize=4)
def _programs(config: TrainConfig) -> Programs:
    return Programs(config)


def _begin(
    model: Model, trunk: nnx.State, router: Any, batch: Batch, key: Array | None
) -> tuple[Array, Any]:
    rest, blocks = split_blocks(trunk)

    def run(rest: nnx.State) -> Array:
        whole, context = model.whole(join_blocks(rest, blocks), router), model.context(batch, key)
        return whole.begin(context.tokens, model.attention(batch), None, context)[0]

    return jax.vjp(run, rest)


def _enter(
    model: Model,
    trunk: nnx.State,
    router: Any,
    layer: Array,
    x: Array,
    batch: Batch,
    key: Array | None,
) -> tuple[tuple[Array, Entered], Any]:
    context = model.context(batch, key, layer)

    def attend(parameters: nnx.State, x: Array) -> tuple[Array, Array]:
        block = model.block(parameters, router, layer)
        return block.enter(x, model.attention(batch), None, context)[:2]

    if model.config.remat != "none":  # the gate is outside: what it chose is never decided again
        attend = jax.checkpoint(attend, policy=REMAT_POLICIES[model.config.remat])

    def run(parameters: nnx.State, x: Array) -> Any:
        x, normed = attend(parameters, x)
        block = model.block(parameters, router, layer)
        moe, tokens = block.moe, normed.reshape(-1, normed.shape[-1])
        noise = moe.router_noise[...] if model.config.moe.rule == "noisy_top_k" else None
        settings = model.config.moe
        chosen, plan = choose(tokens, moe.router[...], moe.bias[...], noise, settings, context)
        stats = router_stats(chosen, plan, normed.shape, settings)
        return (x, normed, chosen.weights, stats.loss), (plan, stats)

    parameters = _slice(split_blocks(trunk)[1], layer)
    (x, normed, weights, _), pull, (plan, stats) = jax.vjp(run, parameters, x, has_aux=True)
    return (x, Entered(normed, weights, plan, stats)), pull


def _leave(
    model: Model,
    trunk: nnx.State,
    router: Any,
    layer: Array,
    x: Array,
    entered: Entered,
    batch: Batch,
    key: Array | None,
    slab: Matrices,
) -> Array:
    added = _second_half(model, router, layer, entered.plan, model.context(batch, key, layer))
    parameters = _slice(split_blocks(trunk)[1], layer)
    return added(x, parameters, entered.normed, entered.weights, slab)


def _second_half(
    model: Model, router: Any, layer: Array, plan: Plan, context: RoutingContext
) -> Callable[..., Array]:
    """(x, block parameters, normed, weights, slab) -> the block's output"""

    def run(
        x: Array, parameters: nnx.State, normed: Array, weights: Array, slab: Matrices
    ) -> Array:
        block, tokens = model.block(parameters, router, layer), normed.reshape(-1, normed.shape[-1])
        down, gate_up = (matrices.astype(normed.dtype) for matrices in slab)
        routed = mixture_of(model.config.moe)(tokens, weights, gate_up, down, plan)
        return block.leave(x, normed, routed.reshape(normed.shape), context)

    return run


def _end(model: Model, trunk: nnx.State, router: Any, x: Array, batch: Batch, key: Array) -> Ended:
    rest, blocks = split_blocks(trunk)
    length, settings = model.length, model.config
    normalisers = [valid_targets(batch, length, k + 1) for k in range(settings.mtp_depth + 1)]
    mtp_key = jax.random.split(key)[1]

    def total(rest: nnx.State, x: Array) -> tuple[Array, Losses]:
        whole = model.whole(join_blocks(rest, blocks), router)
        parts = read_out(whole, x, None, batch, length, normalisers, mtp_key)
        return parts.cross_entropy + settings.mtp_weight * parts.mtp + parts.balance, parts

    (_, parts), (d_rest, d_x) = jax.value_and_grad(total, (0, 1), has_aux=True)(rest, x)
    return Ended(parts, d_rest, d_x)


def _back(
    model: Model,
    trunk: nnx.State,
    router: Any,
    layer: Array,
    entered: Entered,
    batch: Batch,
    key: Array,
    slab: Matrices,
    pull: Any,
    d_x: Array,
) -> Backed:
    parameters = _slice(split_blocks(trunk)[1], layer)
    run = _second_half(model, router, layer, entered.plan, model.context(batch, key, layer))
    inputs = (jnp.zeros_like(d_x), parameters, entered.normed, entered.weights, slab)
    d_x, one, d_normed, d_weights, d_slab = jax.vjp(run, *inputs)[1](d_x)
    other, d_x = pull((d_x, d_normed, d_weights, jnp.ones((), jnp.float32)))
    used = (entered.stats.load > 0)[:, None, None]
    d_slab = tuple(jnp.where(used, gradient, 0) for gradient in d_slab)
    return Backed(jax.tree.map(jnp.add, one, other), d_x, d_slab, _square(d_slab))


def _square(tree: Any) -> Array:
    """Sum of squares; its root is optax.tree.norm."""
    return optax.tree.norm(tree, squared=True)


def _slice(blocks: nnx.State, layer: Array) -> nnx.State:
    return jax.tree.map(lambda leaf: leaf[layer], blocks)


def _nats(model: Model, trunk: nnx.State, router: Any, x: Array, batch: Batch) -> Array:
    targets, mask = shifted_targets(batch["tokens"], batch["segments"], model.length, 1)
    return token_nats(model.whole(trunk, router).logits(x), targets, mask)


def make_finish(config: TrainConfig) -> Callable[..., tuple[TrainState, Metrics, Array]]:
    """The trunk's update from all parts of the gradient, as step.make_step does it."""
    model = config.resolved_model()
    optimizer = make_optimizer(config.optim, config.steps, clip=False)
    schedule = learning_rate(config.optim, config.steps)

    def finish(
        state: TrainState,
        ended: Ended,
        first: nnx.State,
        blocks: tuple[nnx.State, ...],
        squares: tuple[Float[Array, ""], ...],
        stats: tuple[RouterStats, ...],
    ) -> tuple[TrainState, Metrics, Array]:
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *blocks)
        gradients = join_blocks(jax.tree.map(jnp.add, ended.rest, first), stacked)
        norm = jnp.sqrt(_square(gradients) + sum(squares))
        all_stats = {"sparse": jax.tree.map(lambda *parts: jnp.stack(parts), *stats)}
        all_stats |= ended.parts.stats
        balance = sum((part.loss.sum() for part in all_stats.values()), jnp.zeros((), jnp.float32))
        nats, mtp = ended.parts.cross_entropy, ended.parts.mtp
        total = nats + model.mtp_weight * mtp + balance
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def update(_: None) -> tuple[Any, Any, Any]:
            own = clipped(gradients, norm, config.optim.clip_norm)
            updates, moments = optimizer.update(own, state.optimizer, state.parameters)
            rate = model.moe.bias_rate * (state.step < model.moe.bias_until * config.steps)
            router = update_router(state.router, all_stats, rate)
            return optax.apply_updates(state.parameters, updates), router, moments

        def keep(_: None) -> tuple[Any, Any, Any]:
            return state.parameters, state.router, state.optimizer

        parameters, router, moments = lax.cond(finite, update, keep, None)
        skipped, updates = jnp.where(finite, 0, state.skipped + 1), state.updates + finite
        new = TrainState(state.step + 1, updates, skipped, parameters, router, moments, state.key)
        rate = jnp.asarray(schedule(state.updates), jnp.float32)
        bias = optax.tree.norm(router, ord=jnp.inf)
        metrics = Metrics(total, nats, mtp, balance, norm, rate, skipped, bias, all_stats)
        return new, metrics, finite

    return finish
