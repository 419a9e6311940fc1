"""Updates of whole models on one to eight nodes: links alone, and links with software."""

from dataclasses import replace

from moe_jax.config.presets import PRESETS
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.block import block_of
from moe_jax.predict.layouts.block_work import USABLE, Cluster
from moe_jax.predict.layouts.exchange import Exchange
from moe_jax.predict.layouts.fastest import Job, Layout, fastest_fsdp, fastest_pipeline

MODELS = {"qwen3_30b": ("qwen3_30b_a3b", 48), "deepseek_v2_lite": ("deepseek_v2_lite", 32)}
"""Name -> (preset, blocks)."""
SCHEDULES_TRIED = ("dualpipev",)
ROUTES = (Exchange(), Exchange(copies=True), Exchange(copies=True, fp8=True))


def job_of(name: str, nodes: int, link: float) -> Job:
    """Eight rows of 4,096 tokens a device on H100 nodes with this rate inside of a node."""
    preset, blocks = MODELS[name]
    block = block_of(PRESETS[preset].model, 4096)
    return Job(block, blocks, Cluster(find_card("h100"), 8 * nodes).with_link(link), rows=8)


def plain(job: Job) -> Layout | None:
    """The fastest FSDP whose transfers lie under nothing. None: nothing fits."""
    alone = replace(job, route=Exchange(chunks=1))
    return fastest_fsdp(alone, USABLE * job.cluster.card.memory_bytes, overlap=False)


def software(job: Job) -> Layout | None:
    """The fastest of FSDP with overlap and of pipelines, by the fastest exchange."""
    memory = USABLE * job.cluster.card.memory_bytes
    found = []
    for route in ROUTES:
        routed = replace(job, route=route)
        found.append(fastest_fsdp(routed, memory))
        found += [fastest_pipeline(routed, name, memory) for name in SCHEDULES_TRIED]
    there = [layout for layout in found if layout is not None]
    return min(there, key=lambda layout: layout.update.seconds, default=None)
