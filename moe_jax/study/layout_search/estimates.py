"""What is known of a candidate before it is compiled: bytes that it needs at least, and an order.

    bytes >= parameters + moments + gradients on a device, and the stated terms of predict.memory

Parameters, moments and gradients are by the table of layouts (parallel.rules). In a pipeline each
stage has its weights and the sums of their gradients whole, but for the experts' axis.
"""

from functools import cache
from typing import Any

import jax
from jax.sharding import AbstractMesh

from moe_jax.config import ModelConfig, ParallelConfig, TrainConfig
from moe_jax.model.layout import shardings
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import device_bytes, with_sharding
from moe_jax.parallel.schedules import PipelineSchedule
from moe_jax.predict.hardware import Card
from moe_jax.predict.layouts.block import Block, Recompute, block_of
from moe_jax.predict.layouts.block_work import BlockWork, Cluster
from moe_jax.predict.layouts.exchange import NUMBER
from moe_jax.predict.layouts.fsdp import Update, fsdp
from moe_jax.predict.layouts.pipelined import pipelined, schedule_on
from moe_jax.predict.memory import CONTEXT, NCCL
from moe_jax.train.engines.pipelined.engine import schedule_of
from moe_jax.train.engines.pipelined.gradient import layer_count
from moe_jax.train.state import TrainState, tree_bytes

RECOMPUTE: dict[str, Recompute] = {"none": "none", "dots": "selective", "full": "full"}
"""The nearest level of predict.layouts, by model.remat."""


def least_bytes(config: TrainConfig, state: TrainState, devices: int) -> int:
    """Bytes of a device that no program of these settings can do without.

    `state` is abstract. UserError: an axis divides no dimension of a parameter, or the numbers do
    not suit the schedule.
    """
    parallel = config.parallel
    if parallel.pipe > 1:
        _schedule(parallel).layers_of_piece(layer_count(config.model))
    sizes = parallel.sizes(devices)
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh: Any = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=types)
    laid_out = with_sharding(state, shardings(mesh, state))
    gradients = device_bytes(laid_out.parameters)
    if parallel.pipe > 1:
        # Weights and sums: every device of a stage has them whole.
        whole = tree_bytes(state.parameters) // (parallel.pipe * parallel.expert)
        gradients = max(gradients, 2 * whole)
    return device_bytes(laid_out) + gradients + CONTEXT + (NCCL if devices > 1 else 0)


@cache
def _block(model: ModelConfig, length: int) -> Block:
    return block_of(model, length)


@cache
def _schedule(parallel: ParallelConfig) -> PipelineSchedule:
    return schedule_of(parallel)


def rough_update(config: TrainConfig, card: Card, devices: int) -> Update:
    """A step by predict.layouts, to compile the most promising first.

    Tensor parallelism divides the work, and adds four all-reduces a block. Nothing is known of
    models without experts, which that formula does not have.
    """
    model = config.model
    if not model.moe_layers:
        return Update(0.0, 0.0)
    parallel = config.parallel
    cluster = Cluster(card, devices)
    parts = (parallel.microbatches or 1) if parallel.pipe > 1 else config.optim.accumulation
    rows = config.batch / parts / (devices // parallel.pipe // parallel.tensor)
    tokens = round(rows * config.data.length)
    work = BlockWork(
        _block(model, config.data.length),
        cluster,
        max(1, tokens // parallel.tensor),
        parallel.expert,
        RECOMPUTE[model.remat],
    )
    if parallel.pipe > 1:
        chunks = parallel.chunks if parallel.schedule == "interleaved" else 1
        schedule = schedule_on(parallel.schedule, parallel.pipe, parts, chunks)
        return pipelined(work, model.layers, schedule, lockstep=True)
    update = fsdp(work, model.layers, parts, parallel.fsdp * parallel.expert)
    sums = cluster.seconds("all-reduce", NUMBER * tokens * model.width, parallel.tensor)
    return Update(update.seconds + 4 * parts * model.layers * sums, update.memory)
