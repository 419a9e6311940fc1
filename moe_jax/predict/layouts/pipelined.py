"""An update in a pipeline, by a schedule.

G devices make a pipeline, and N/G pipelines share the batch. The N/G devices of a stage hold its
weights in bfloat16 and the sum of their gradient in float32, whole but for the routed experts,
which `expert_axis` devices share. Parameters and moments in float32 are split over all N devices.
After the schedule come a reduce-scatter of the gradients, the optimizer, and a gather of the
weights. All three are exposed, because the gradient's norm is known only then.

Two ways to run a schedule:

    free       every device goes on as soon as its input is there, as in one program a device.
               An operation costs `overhead` more: the host must start it.
    lockstep   all devices go from tick to tick together, as our executor does. A tick takes as
               long as its slowest device, then every channel sends once, and `overhead` is added.
               Backwards are whole or in two ticks, as it is faster.

In an overlapped pair (DualPipe's F&B) that runs free, all exchanges lie under all products. In
lockstep a pair takes the sum of its parts.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from moe_jax.parallel.schedules import Kind, PipelineSchedule, build
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.parallel.simulate import activations_of_steps, simulate
from moe_jax.parallel.ticks import IDLE, OVERLAPPED, tick_table
from moe_jax.predict.layouts.block_work import STATE, SUM, BlockWork, Part
from moe_jax.predict.layouts.exchange import NUMBER
from moe_jax.predict.layouts.fsdp import UPDATE_TRAFFIC, Update


class Ticks(NamedTuple):
    """What the ticks of a schedule have in common."""

    channels: int
    """Messages that every device of our executor sends in each tick, needed or not."""
    kinds: tuple[tuple[frozenset[int], int], ...]
    """(kinds of work that meet in a tick, number of such ticks)"""

    @property
    def number(self) -> int:
        """Ticks of an update."""
        return sum(count for _, count in self.kinds)


# Equal only to itself: the hash of all orders would take longer than what is kept here.
@dataclass(frozen=True, eq=False)
class Prepared:
    """A schedule, with what is asked of it for every layout."""

    schedule: PipelineSchedule

    @cached_property
    def ticks(self) -> Ticks:
        """Counts of its table of ticks."""
        table = tick_table(self.schedule)
        kinds = Counter(frozenset(row) for row in table.kinds.tolist())
        return Ticks(sum(channel.hop > 0 for channel in table.channels), tuple(kinds.items()))

    @cached_property
    def halves(self) -> "Prepared":
        """With its whole backwards in two steps. Itself if it has none."""
        return Prepared(split_backwards(self.schedule)) if self.whole else self

    @cached_property
    def whole(self) -> bool:
        """Whether it has a whole backward that is a step by itself."""
        orders = self.schedule.orders
        return any(step[0].kind == Kind.BACKWARD for order in orders for step in order)

    @cached_property
    def held(self) -> frozenset[tuple[float, float]]:
        """All (kept, pending) that a device has in a step (simulate.activations_of_steps)."""
        return frozenset(pair for device in activations_of_steps(self.schedule) for pair in device)

    @cached_property
    def sends(self) -> int:
        """Messages of the device that sends the most, activations and gradients."""
        counts = [0] * self.schedule.devices
        of_path = self.schedule.microbatches // len(self.schedule.paths)
        for path in self.schedule.paths:
            for here, there in pairwise(path):
                if here.device != there.device:
                    counts[here.device] += of_path
                    counts[there.device] += of_path
        return max(counts)


@lru_cache(maxsize=256)
def schedule_on(name: str, devices: int, microbatches: int, chunks: int = 1) -> Prepared:
    """The schedule for so many devices. DualPipeV has two stages on each of them.

    UserError: the numbers do not suit the schedule.
    """
    stages = 2 * devices if name == "dualpipev" else devices
    return Prepared(build(name, stages=stages, microbatches=microbatches, chunks=chunks))


def pipelined(
    work: BlockWork,
    blocks: int,
    prepared: Prepared,
    *,
    overhead: float = 0.0,
    lockstep: bool = False,
) -> Update:
    """An update of a model of equal blocks.

    work: a block for one micro-batch.
    overhead: seconds of an operation, or of a tick in lockstep, that no product needs.
    """
    if lockstep:
        way = in_ticks(work, blocks, prepared, overhead)
        return _update(work, blocks, way, _lockstep(work, blocks, way, overhead))
    return _update(work, blocks, prepared, _free(work, blocks, prepared, overhead))


def in_ticks(work: BlockWork, blocks: int, prepared: Prepared, overhead: float) -> Prepared:
    """The schedule with whole backwards or with backwards in two ticks, as it is faster."""
    ways = (prepared, prepared.halves)
    return min(ways, key=lambda way: _lockstep(work, blocks, way, overhead))


def _update(work: BlockWork, blocks: int, prepared: Prepared, ran: float) -> Update:
    after = _between_updates(work, blocks, prepared.schedule)
    return Update(ran + after, memory_of(work, blocks, prepared))


def message_seconds(work: BlockWork) -> float:
    """Of a message to the next stage. Stages are neighbours on the network if there are nodes."""
    cluster = work.cluster
    stride = cluster.card.node if cluster.devices > cluster.card.node else 1
    return cluster.seconds("collective-permute", work.message, 2, stride)


def _free(work: BlockWork, blocks: int, prepared: Prepared, overhead: float) -> float:
    schedule = prepared.schedule
    more = overhead / schedule.piece_size  # simulate takes the costs of a stage
    message = message_seconds(work)
    parts = (work.forward, work.backward_input, work.backward_weight)
    n = blocks / schedule.stages
    costs = (
        n * parts[0].seconds(work.parts) + more,
        n * parts[1].seconds(work.parts) + more,
        # A whole backward is started once.
        n * parts[2].seconds(1) + (0.0 if prepared.whole else more),
        n * _pair(parts) + more,
    )
    # A device's link sends one message at a time.
    return max(_makespan(prepared, costs, message), prepared.sends * message)


# The same costs come again with every limit of memory.
@lru_cache(maxsize=50_000)
def _makespan(
    prepared: Prepared, costs: tuple[float, float, float, float], message: float
) -> float:
    return simulate(prepared.schedule, *costs, communication=message).makespan


def _lockstep(work: BlockWork, blocks: int, prepared: Prepared, overhead: float) -> float:
    """simulate(..., lockstep=True).makespan, from the kinds of work that meet in a tick."""
    piece = blocks / prepared.schedule.pieces
    forward = piece * work.forward.seconds(work.parts)
    to_input = piece * work.backward_input.seconds(work.parts)
    to_weight = piece * work.backward_weight.seconds(1)
    costs = {
        IDLE: 0.0,
        Kind.FORWARD: forward,
        Kind.BACKWARD_INPUT: to_input,
        Kind.BACKWARD_WEIGHT: to_weight,
        Kind.BACKWARD: to_input + to_weight,
        OVERLAPPED: forward + to_input + to_weight,
    }
    ticks = prepared.ticks
    between = ticks.channels * message_seconds(work) + overhead
    return sum(count * (max(costs[k] for k in kinds) + between) for kinds, count in ticks.kinds)


def _pair(parts: tuple[Part, ...]) -> float:
    """F&B of a block: the longer one of all products and all exchanges."""
    return max(sum(part.compute for part in parts), sum(part.exchange for part in parts))


def _between_updates(work: BlockWork, blocks: int, schedule: PipelineSchedule) -> float:
    """Seconds from the end of a schedule to the start of the next one."""
    cluster = work.cluster
    replicas = cluster.devices // schedule.devices
    copies = len(schedule.paths)  # DualPipe has each stage on two devices of a pipeline
    n = blocks_of_device(blocks, schedule)
    axis = work.expert_axis
    seconds = 0.0
    for weights, size, stride in (
        (n * work.block.other_weights, copies * replicas, 1),
        (n * work.local_experts, copies * replicas // axis, axis),
    ):
        seconds += cluster.seconds("reduce-scatter", SUM * weights, size, stride)
        seconds += cluster.seconds("all-gather", NUMBER * weights / size, size, stride)
    own = blocks * work.block.weights / cluster.devices
    return seconds + UPDATE_TRAFFIC * own / cluster.card.memory_rate


def blocks_of_device(blocks: int, schedule: PipelineSchedule) -> float:
    """Blocks whose weights lie on a device."""
    return blocks / schedule.stages * schedule.weights


def memory_of(work: BlockWork, blocks: int, prepared: Prepared) -> float:
    """Bytes of a device: state, weights, sums of gradients, what is kept from F and Bi to W."""
    schedule = prepared.schedule
    state = STATE * blocks * work.block.weights / work.cluster.devices
    weights = (NUMBER + SUM) * blocks_of_device(blocks, schedule) * work.local
    stage = blocks / schedule.stages
    activations = max(
        # A whole backward holds one block's gradients at a time.
        stage * kept * work.kept + max(stage * pending, 1) * work.pending
        for kept, pending in prepared.held
    )
    return state + weights + activations


class Tick(NamedTuple):
    """Seconds of a mean tick in lockstep. Their sum is the length of a tick."""

    work: float
    """Operations, the mean of the devices."""
    waiting: float
    """For the slowest device of the tick. The bubble is a part of it."""
    messages: float
    overhead: float


def tick_parts(work: BlockWork, blocks: int, prepared: Prepared, overhead: float) -> Tick:
    """What the mean tick of a schedule consists of."""
    number = prepared.ticks.number
    parts = (work.forward.seconds(work.parts), work.backward_input.seconds(work.parts))
    operations = sum(parts) + work.backward_weight.seconds(1)
    schedule = prepared.schedule
    busy = schedule.microbatches * blocks * operations / schedule.devices / number
    messages = prepared.ticks.channels * message_seconds(work)
    length = _lockstep(work, blocks, prepared, overhead) / number
    return Tick(busy, length - busy - messages - overhead, messages, overhead)
