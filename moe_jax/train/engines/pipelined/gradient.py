"""The model as the stages of a pipeline, and the gradient of an update from parallel.executor.

The layers of the pipeline are the sparse blocks, or the dense blocks of a dense model. Embedding
and dense blocks before them run with the first layer, and the head, multi-token prediction and the
objective with the last one. The gradient is that of make_gradient with as many micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_jax.base.initial import layer_keys
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.model import stages
from moe_jax.model.abstract import abstract_model, graph_of, split_model
from moe_jax.model.block import Block
from moe_jax.model.parameters import kind_of
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import (
    Batch,
    Losses,
    Objective,
    Part,
    Reading,
    balance_loss,
    losses,
    part_of,
    share_of,
    whole_batch,
)
from moe_jax.parallel.exchange import exchange_in_force
from moe_jax.parallel.executor import PIPE, Arguments, Stages, make_gradient
from moe_jax.parallel.gradient_split import SAVEABLE
from moe_jax.parallel.mesh import BATCH, EXPERT, sum_over_batch
from moe_jax.parallel.schedules import PipelineSchedule
from moe_jax.train.step import micro_batches

Flat = dict[Any, Any]
"""Arrays by their path, a tuple. Such trees keep their type when parts of them are put together."""


def make_pipelined_gradient(
    config: TrainConfig, objective: Objective, schedule: PipelineSchedule, mesh: Mesh
) -> Callable[..., Any]:
    """(parameters, router, batch, key, *operands) -> ((total loss, Losses), gradients).

    It is make_gradient's with optim.accumulation = M. `model.remat` says what is kept of a layer
    between its forward and its backward: "full" keeps its input alone.
    """
    model = config.model
    name = stack_name(model)
    parts = schedule.microbatches

    def of_batch(
        parameters: nnx.State, router: nnx.State, batch: Batch, key: Array, *operands: Any
    ) -> Any:
        arguments, rows = make_arguments(config, parts, parameters, router, batch, key, *operands)
        specs = Arguments(
            shared=_experts_apart(arguments.shared),
            layers=_experts_apart(arguments.layers, PIPE),
            own=P(PIPE),
            constants=P(),
            contexts={"batch": P(None, BATCH), "key": P(), "shares": P()},
        )
        gradient = make_gradient(
            schedule,
            PipelinedModel(config, objective, rows).as_stages(),
            mesh,
            specs,
            SAVEABLE[model.remat],
        )
        result = gradient(arguments)
        gradients = _together(result.shared, result.layers, name)
        return (result.loss, _all_losses(model, result.others, result.results)), gradients

    return of_batch


def _experts_apart(parameters: Flat, *stacked: str) -> dict[Any, P]:
    """Every device of the axis `expert` has its own routed experts, and all of the rest.

    `stacked` are the axes over which leading dimensions are split. With the exchange `weights`
    every device has all experts.
    """
    kept = exchange_in_force().kind == "weights"

    def spec(path: Any, leaf: Any) -> P:
        kind = kind_of(path)
        if kept or kind.role != "expert":
            return P(*stacked)
        leading = len(jax.tree.leaves(leaf)[0].shape) - len(kind.axes.split())  # stacked layers
        return P(*stacked, *[None] * (leading - len(stacked)), EXPERT)

    return {path: spec(path, leaf) for path, leaf in parameters.items()}


def make_arguments(
    config: TrainConfig,
    parts: int,
    parameters: nnx.State,
    router: nnx.State,
    batch: Batch,
    key: Array,
    *operands: Any,
) -> tuple[Arguments, int]:
    """(what the executor takes for a batch in so many micro-batches, sequences of the batch)."""
    model = config.model
    name = stack_name(model)
    length = config.data.length
    whole = whole_batch(batch, length, model.mtp_depth, key)
    micro = micro_batches(batch, parts)
    shares = jax.vmap(lambda part: part_of(whole, part, length, None).shares)(micro)
    contexts = {"batch": micro, "key": layer_keys(key, parts), "shares": shares}
    shared, layers = _apart(parameters, name)
    own = {"index": jnp.arange(layer_count(model)), "router": _apart(router, name)[1]}
    constants = {"router": router, "normalisers": whole.normalisers, "operands": operands}
    return Arguments(shared, layers, own, constants, contexts), whole.rows


def stack_name(model: ModelConfig) -> str:
    """The stack whose blocks are the layers of the pipeline."""
    return "sparse" if model.moe_layers else "dense"


def layer_count(model: ModelConfig) -> int:
    """Layers of the pipeline."""
    return model.moe_layers or model.dense_layers


def _all_losses(model: ModelConfig, others: Any, of_last: Losses) -> Losses:
    stats = {"sparse": others} | of_last.stats if model.moe_layers else of_last.stats
    return of_last._replace(stats=stats, balance=balance_loss(stats))


@dataclass(frozen=True)
class PipelinedModel:
    """The three functions that the executor takes, for one objective."""

    config: TrainConfig
    objective: Objective
    rows: int
    """Sequences of the whole batch."""

    def as_stages(self) -> Stages:
        return Stages(self.first, self.layer, self.last)

    def first(self, shared: Any, c: Any) -> Array:
        """The residual stream before the first layer of the pipeline."""
        model = self._model(shared, c)
        context = self._context(c)
        if self.config.model.moe_layers:
            return model.begin(context)[0]
        return stages.begin(model, context)

    def layer(self, p: Any, x: Array, c: Any) -> tuple[Array, Array, Any]:
        """One block, its balance losses, and its statistics."""
        own, of_batch = c
        model = self.config.model
        context = self._context(of_batch).at(stack_name(model))
        context = context.at(own["index"])
        states = (nnx.from_flat_state(tree) for tree in (p, own["router"]))
        block = nnx.merge(_block_graph(model), *states)
        x, _, stats = stages.run_block(block, x, context)
        if stats is None:
            return x, jnp.zeros(()), ()
        stats = share_of(stats._replace(experts=None), self._part(of_batch), 0)
        return x, stats.loss, stats

    def last(self, shared: Any, y: Array, c: Any) -> tuple[Array, Losses]:
        """Everything after the last layer, with sums over the whole batch."""
        constants, _ = c
        reading = Reading(
            self._model(shared, c), self._part(c), self.config.data.length, y, stats=None
        )
        parts = losses(self.objective, reading, *constants["operands"])
        # Balance losses are of all rows already (moe.balance).
        parts = parts._replace(
            cross_entropy=sum_over_batch(parts.cross_entropy),
            mtp=sum_over_batch(parts.mtp),
            distillation=sum_over_batch(parts.distillation),
        )
        return parts.total(self.config.model.mtp_weight), parts

    def _part(self, c: Any) -> Part:
        constants, own = c
        return Part(
            batch=own["batch"],
            normalisers=constants["normalisers"],
            key=own["key"],
            rows=self.rows,
            shares=own["shares"],
        )

    def _context(self, c: Any) -> stages.Context:
        part = self._part(c)
        length = self.config.data.length
        tokens = part.batch["tokens"][:, :length]
        segments = part.batch["segments"][:, :length]
        return stages.whole_documents(self.config.model, tokens, segments, part.key)

    def _model(self, shared: Any, c: Any) -> Transformer:
        """The model without the layers of the pipeline, which are shapes in it."""
        constants, _ = c
        model = self.config.model
        name = stack_name(model)
        absent = _apart(split_model(abstract_model(model))[1], name)[1]
        return nnx.merge(graph_of(model), _together(shared, absent, name), constants["router"])


def _apart(state: nnx.State, name: str) -> tuple[Flat, Flat]:
    """(everything else, the blocks of the stack `name`)"""
    flat: Any = dict(nnx.to_flat_state(state))
    blocks = (name, "blocks")
    others = {path: leaf for path, leaf in flat.items() if path[:2] != blocks}
    return others, {path[2:]: leaf for path, leaf in flat.items() if path[:2] == blocks}


def _together(others: Flat, blocks: Flat, name: str) -> nnx.State:
    """The inverse of _apart."""
    moved: Any = {(name, "blocks", *path): leaf for path, leaf in blocks.items()}
    return nnx.from_flat_state(others | moved)


def _block_graph(model: ModelConfig) -> nnx.GraphDef:
    sparse = stack_name(model) == "sparse"
    block = nnx.eval_shape(lambda: Block(model, sparse=sparse, key=jax.random.key(0)))
    return split_model(block)[0]
