"""An update under fully sharded data parallelism, with or without expert parallelism.

Parameters, moments and gradients are split over `shards` devices. More devices are copies of these,
which split the batch further. Each pass over a part of a device's rows does for each block:

    forward    gather the weights in bfloat16
    backward   gather them again, and reduce-scatter their gradient in bfloat16

A block takes as long as the longer one of its work and its transfers, the exchange included: the
transfers of a block lie under the work of its neighbours. The first gather and the last
reduce-scatter are exposed. That is the best overlap there can be.
"""

from dataclasses import dataclass

from moe_jax.predict.layouts.block_work import STATE, SUM, BlockWork
from moe_jax.predict.layouts.exchange import NUMBER

UPDATE_TRAFFIC = 28
"""Bytes of memory traffic that the optimizer has for a parameter: it reads parameter, gradient and
two moments in float32, and writes all but the gradient."""


@dataclass(frozen=True)
class Update:
    """An update, predicted."""

    seconds: float
    memory: float
    """Bytes of a device, at the most."""


def fsdp(work: BlockWork, blocks: int, passes: int, shards: int, *, overlap: bool = True) -> Update:
    """An update of `passes` passes with the state split over `shards` devices.

    work: a block for the rows of one pass. Its expert axis divides the shards.
    overlap: False exposes every gather and reduce-scatter.
    """
    gather, scatter = _transfers(work, shards)
    forward = work.forward
    to_input = work.backward_input
    forwards = forward.seconds(work.parts)
    backwards = to_input.seconds(work.parts) + work.backward_weight.seconds(1)
    if overlap:
        forwards = max(forwards, gather + forward.exchange)
        backwards = max(backwards, gather + scatter + to_input.exchange)
        edges = gather + scatter
    else:
        forwards += gather
        backwards += gather + scatter
        edges = 0.0
    between = _between_copies(work, blocks, shards)
    if overlap:
        # It can lie under the last pass, where that is not full of transfers already.
        between = max(0.0, between - blocks * (backwards - gather - scatter - to_input.exchange))
    seconds = passes * blocks * (forwards + backwards) + edges + between
    seconds += UPDATE_TRAFFIC * blocks * work.block.weights / shards / work.cluster.card.memory_rate
    return Update(seconds, _memory(work, blocks, shards))


def _transfers(work: BlockWork, shards: int) -> tuple[float, float]:
    """Seconds of the gather and of the reduce-scatter of a block.

    Routed experts are gathered over every `expert_axis`-th device alone.
    """
    axis = work.expert_axis
    parts = ((work.block.other_weights, shards, 1), (work.local_experts, shards // axis, axis))
    gather = 0.0
    scatter = 0.0
    for weights, size, stride in parts:
        gather += work.cluster.seconds("all-gather", NUMBER * weights / size, size, stride)
        scatter += work.cluster.seconds("reduce-scatter", NUMBER * weights, size, stride)
    return gather, scatter


def _between_copies(work: BlockWork, blocks: int, shards: int) -> float:
    """Seconds of the sum of all gradients over the copies of the shards."""
    copies = work.cluster.devices // shards
    bytes = NUMBER * blocks * work.block.weights / shards
    return work.cluster.seconds("all-reduce", bytes, copies, shards)


def _memory(work: BlockWork, blocks: int, shards: int) -> float:
    """State and gradient's sum, two gathered blocks, a block's gradient, activations of a pass."""
    own = (STATE + SUM) * blocks * work.block.weights / shards
    return own + 3 * NUMBER * work.local + blocks * work.kept + work.pending
