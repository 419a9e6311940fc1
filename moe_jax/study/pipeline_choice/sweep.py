"""The fastest layouts of a job over link speeds, memory limits and the cost of a tick."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from moe_jax.config.presets import PRESETS
from moe_jax.parallel.schedules import SCHEDULES
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.block import block_of
from moe_jax.predict.layouts.block_work import USABLE, Cluster
from moe_jax.predict.layouts.fastest import (
    FSDP,
    ONCE,
    Job,
    Layout,
    fastest_fsdp,
    fastest_once,
    fastest_pipeline,
)

NO_OVERLAP = "fsdp without overlap"
LENGTH = 4096


@dataclass(frozen=True)
class Case:
    """A model of equal blocks, a cluster, and the link whose speed is swept."""

    name: str
    text: str
    preset: str
    """The blocks are the sparse blocks of this preset."""
    blocks: int
    card: str
    devices: int
    inside: bool = False
    """The swept link is the one inside of a node."""

    def job(self, rows: int) -> Job:
        """The update, on the card's own links."""
        block = block_of(PRESETS[self.preset].model, LENGTH)
        return Job(block, self.blocks, Cluster(find_card(self.card), self.devices), rows, LENGTH)

    def at(self, job: Job, rate: float) -> Job:
        """The update with another rate of the swept link, in bytes a second."""
        cluster = job.cluster
        return job.on(cluster.with_link(rate) if self.inside else cluster.with_network(rate))


CASES = (
    Case(
        "deepseek_v3",
        "64 blocks of DeepSeek-V3 on 2,048 H200",
        "deepseek_v3",
        64,
        "h200",
        2048,
    ),
    Case("qwen3_30b", "48 blocks of Qwen3-30B-A3B on 64 H100", "qwen3_30b_a3b", 48, "h100", 64),
    Case(
        "one_node",
        "32 blocks of DeepSeek-V2-Lite on 8 H100",
        "deepseek_v2_lite",
        32,
        "h100",
        8,
        inside=True,
    ),
)

Layouts = dict[str, Layout | None]
"""By FSDP, ONCE, NO_OVERLAP or a schedule. None: it does not fit."""


def usable(job: Job) -> float:
    """Bytes of the job's card for arrays."""
    return USABLE * job.cluster.card.memory_bytes


def layouts_of(
    job: Job, memory: float, overhead: float, names: Iterable[str] = tuple(SCHEDULES)
) -> Layouts:
    """The fastest layout of every kind, schedules running free."""
    found: Layouts = {
        FSDP: fastest_fsdp(job, memory),
        NO_OVERLAP: fastest_fsdp(job, memory, overlap=False),
        ONCE: fastest_once(job, memory),
    }
    for name in names:
        found[name] = fastest_pipeline(job, name, memory, overhead=overhead)
    return found


def lockstep_of(
    job: Job, memory: float, overhead: float, names: Iterable[str] = tuple(SCHEDULES)
) -> Layouts:
    """The fastest layout of every schedule in our executor's lockstep."""
    return {
        name: fastest_pipeline(job, name, memory, overhead=overhead, lockstep=True)
        for name in names
    }


def seconds(layout: Layout | None) -> float | None:
    """Of an update, None if it does not fit."""
    return None if layout is None else layout.update.seconds


def winner(layouts: Mapping[str, Layout | None], keep: Callable[[str], bool]) -> Layout | None:
    """The fastest of those whose name is kept."""
    there = [layout for name, layout in layouts.items() if layout is not None and keep(name)]
    return min(there, key=lambda layout: layout.update.seconds, default=None)


def best_pipeline(layouts: Mapping[str, Layout | None]) -> Layout | None:
    """The fastest schedule."""
    return winner(layouts, lambda name: name in SCHEDULES)


def best_sharded(layouts: Mapping[str, Layout | None]) -> Layout | None:
    """The faster one of FSDP and of gathering once."""
    return winner(layouts, lambda name: name in (FSDP, ONCE))


def gain(layouts: Mapping[str, Layout | None]) -> float | None:
    """Speed of the best pipeline over the best sharded layout. None: one of them does not fit."""
    pipeline = seconds(best_pipeline(layouts))
    sharded = seconds(best_sharded(layouts))
    return None if pipeline is None or sharded is None else sharded / pipeline
