"""The fastest layout of a kind that fits into a device's memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, get_args

from moe_jax.base.errors import UserError
from moe_jax.predict.layouts.block import Block, Recompute
from moe_jax.predict.layouts.block_work import BlockWork, Cluster
from moe_jax.predict.layouts.exchange import Exchange
from moe_jax.predict.layouts.fsdp import Update, fsdp
from moe_jax.predict.layouts.pipelined import Prepared, memory_of, pipelined, schedule_on

EXPERT_AXES = (1, 8, 16, 32, 64)
"""Devices that may share the experts."""
DEPTHS = (2, 4, 8, 16)
"""Devices that a pipeline may have."""
LEVELS = get_args(Recompute)
INTERLEAVED = (2, 4)
"""Pieces of a stage that are tried for `interleaved`."""
FSDP = "fsdp"
ONCE = "gathered once"
"""Data parallelism that gathers all weights once an update (ZeRO-1): a pipeline of one device."""


@dataclass(frozen=True)
class Job:
    """An update of a model of equal sparse blocks on a cluster."""

    block: Block
    blocks: int
    cluster: Cluster
    rows: int
    """Rows of a device in an update."""
    length: int = 4096
    """Tokens of a row."""
    route: Exchange = field(default_factory=Exchange)

    @property
    def tokens(self) -> int:
        """Of a device in an update."""
        return self.rows * self.length

    @property
    def ideal(self) -> float:
        """Seconds of the model's products alone, nothing recomputed."""
        return self.tokens * self.blocks * self.block.flops / self.cluster.product_rate

    def work(self, rows: int, expert_axis: int, recompute: Recompute) -> BlockWork:
        """A block for a micro-batch of so many rows."""
        tokens = rows * self.length
        return BlockWork(self.block, self.cluster, tokens, expert_axis, recompute, self.route)

    def on(self, cluster: Cluster) -> "Job":
        """The same on another cluster."""
        return replace(self, cluster=cluster)


@dataclass(frozen=True)
class Layout:
    """A way to lay a job out on its cluster, and what it costs."""

    name: str
    """A schedule, FSDP or ONCE."""
    depth: int
    """Devices of a pipeline."""
    expert_axis: int
    recompute: Recompute
    update: Update
    pieces: int = 1
    """Pieces of a stage, of `interleaved`."""
    shards: int = 0
    """Of FSDP: devices over which the state is split."""
    microbatch: int = 1
    """Rows of a micro-batch."""


def work_of(job: Job, layout: Layout) -> BlockWork:
    """A block for a micro-batch of the layout."""
    return job.work(layout.microbatch, layout.expert_axis, layout.recompute)


def schedule_of(job: Job, layout: Layout) -> Prepared:
    """The schedule of a pipeline."""
    return schedule_on(layout.name, layout.depth, job.rows * layout.depth, layout.pieces)


def fastest_fsdp(job: Job, memory: float, *, overlap: bool = True) -> Layout | None:
    """The fastest of all passes, shards, expert axes, with and without recomputation.

    None: none fits into so many bytes.
    """
    found = None
    devices = job.cluster.devices
    node = min(job.cluster.card.node, devices)
    for work, rows in _works(job, devices):
        for shards in (node * 2**power for power in range((devices // node).bit_length())):
            if shards % work.expert_axis or devices % shards:
                continue
            update = fsdp(work, job.blocks, job.rows // rows, shards, overlap=overlap)
            layout = Layout(
                FSDP,
                1,
                work.expert_axis,
                work.recompute,
                update,
                shards=shards,
                microbatch=rows,
            )
            if update.memory <= memory:
                found = _faster(found, layout)
    return found


def fastest_pipeline(
    job: Job,
    name: str,
    memory: float,
    *,
    overhead: float = 0.0,
    lockstep: bool = False,
    depth: int | None = None,
) -> Layout | None:
    """The fastest pipeline by a schedule, over depths, expert axes, with and without recomputation.

    depth: this one alone. None as a result: none fits into so many bytes.
    """
    best = None
    found = sorted(_pipelines(job, name, depth), key=lambda pipeline: pipeline.least)
    for least, work, chunks, devices in found:
        if best is not None and least >= best.update.seconds:
            break
        try:
            schedule = schedule_on(name, devices, job.rows * devices, chunks)
        except UserError:  # too few micro-batches for it
            continue
        if memory_of(work, job.blocks, schedule) > memory:
            continue
        update = pipelined(work, job.blocks, schedule, overhead=overhead, lockstep=lockstep)
        if update.memory <= memory:  # backwards in two ticks may need more than the schedule
            axis = work.expert_axis
            layout = Layout(name, devices, axis, work.recompute, update, pieces=chunks)
            best = _faster(best, layout)
    return best


def fastest_once(job: Job, memory: float) -> Layout | None:
    """The fastest data parallelism that gathers all weights once an update."""
    found = fastest_pipeline(job, "1f1b", memory, depth=1)
    return None if found is None else replace(found, name=ONCE)


def _faster(one: Layout | None, other: Layout) -> Layout:
    return other if one is None or other.update.seconds < one.update.seconds else one


def _works(job: Job, replicas: int) -> Iterator[tuple[BlockWork, int]]:
    """Blocks for all rows of a pass, expert axes within `replicas` devices, and recomputation."""
    for rows in (rows for rows in range(1, job.rows + 1) if job.rows % rows == 0):
        for axis in EXPERT_AXES:
            if replicas % axis == 0 and job.block.experts % axis == 0:
                for recompute in LEVELS:
                    yield job.work(rows, axis, recompute), rows


class _Pipeline(NamedTuple):
    """A pipeline that may be the fastest."""

    least: float
    """Seconds of all operations of a device. No update is shorter."""
    work: BlockWork
    pieces: int
    depth: int


def _pipelines(job: Job, name: str, depth: int | None) -> Iterator[_Pipeline]:
    """All that divide the blocks, with micro-batches of one row."""
    halves = 2 if name in ("zb-v", "dualpipev") else 1
    for chunks in INTERLEAVED if name == "interleaved" else (1,):
        for devices in _depths(job, depth):
            pieces = devices * chunks * halves
            if job.blocks % pieces or (devices == 1 and name != "1f1b"):
                continue
            for work, rows in _works(job, job.cluster.devices // devices):
                if rows == 1:
                    yield _Pipeline(_least(job, work, name), work, chunks, devices)


def _depths(job: Job, depth: int | None) -> tuple[int, ...]:
    if depth is not None:
        return (depth,)
    return tuple(p for p in DEPTHS if job.cluster.devices % p == 0)


def _least(job: Job, work: BlockWork, name: str) -> float:
    parts = (work.forward, work.backward_input, work.backward_weight)
    if name.startswith("dualpipe"):  # whose pairs may hide every exchange
        seconds = sum(part.compute for part in parts)
    else:
        seconds = sum(part.seconds(work.parts) for part in parts)
    return job.rows * job.blocks * seconds
