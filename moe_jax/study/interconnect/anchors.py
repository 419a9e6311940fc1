"""What others measured of exchanges and of their overlap, beside the prediction."""

from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.config.presets import PRESETS
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.block import Block, Level, Recompute, block_of
from moe_jax.predict.layouts.block_work import Cluster
from moe_jax.predict.layouts.exchange import Exchange
from moe_jax.study.interconnect.ladder import PLAIN, BlockOn, Way

COPIES = Way("copies", Exchange(copies=True, chunks=1))
COPIES_FP8 = Way("copies in FP8", Exchange(copies=True, fp8=True, chunks=1))
MEGATRON = "Megatron-LM, functional test moe_perf"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge, expert-parallel-overlap"


class Anchor(NamedTuple):
    """A measured number and ours."""

    name: str
    measured: float
    predicted: float
    unit: str
    source: str


def anchors() -> list[Anchor]:
    """All of them."""
    return [*_layers(), *_overlaps(), *_profile()]


def experts_alone(width: int, hidden: int, experts: int, per_token: int) -> Block:
    """A mixture's routed experts, and nothing else."""
    weights = 3 * width * hidden * experts
    kept: dict[Recompute, Level] = {"none": Level(0.0, 0.0, 0.0)}  # memory is not asked here
    return Block(
        width=width,
        experts=experts,
        per_token=per_token,
        expert_weights=weights,
        other_weights=0,
        scores=0.0,
        levels=kept,
    )


def _layers() -> Iterator[Anchor]:
    """One layer on 8 H100, 4096 tokens a device, forced balance: forward and backward in ms."""
    cluster = Cluster(find_card("h100"), 8)
    layers = {
        "Mixtral layer": (
            experts_alone(4096, 14336, 8, 2),
            ((PLAIN, 4.33, 7.68), (COPIES, 4.34, 7.74)),
        ),
        "DeepSeek layer": (
            experts_alone(7168, 2048, 32, 8),
            ((PLAIN, 7.12, 10.48), (COPIES, 5.39, 8.80)),
        ),
    }
    for name, (block, rows) in layers.items():
        here = BlockOn(block, cluster)
        for way, forward, backward in rows:
            mine = here.forward(way)
            rest = here.seconds(way) - mine
            label = f"{name}, {'all-to-all' if way is PLAIN else 'HybridEP'}"
            yield Anchor(f"{label}, forward", forward, 1e3 * mine, "ms", MEGATRON)
            yield Anchor(f"{label}, backward", backward, 1e3 * rest, "ms", MEGATRON)


def _overlaps() -> Iterator[Anchor]:
    """A step's speed with the exchange of one micro-batch under another's work, over without."""
    qwen = block_of(PRESETS["qwen3_30b_a3b"].model, 4096)
    here = BlockOn(qwen, Cluster(find_card("h100"), 16))
    for way, off, on, name in (
        (COPIES, 24.714, 20.992, "HybridEP"),
        (PLAIN, 41.25, 31.31, "all-to-all"),
    ):
        pairs = Way(way.name, way.route, pairs=True)
        gain = here.seconds(way) / here.seconds(pairs)
        label = f"Qwen3-30B-A3B on 16 H100, {name}, overlap"
        yield Anchor(label, off / on, gain, "x, speed with over without", BRIDGE)


def _profile() -> Iterator[Anchor]:
    """DeepSeek-V3's profile of F&B: four blocks, 64 H800, at most four nodes, FP8 dispatch."""
    block = block_of(PRESETS["deepseek_v3"].model, 4096)
    route = Exchange(copies=True, nodes=4, fp8=True)
    way = Way("profile", route, pairs=True)
    here = BlockOn(block, Cluster(find_card("h800"), 64))
    source = "deepseek-ai, published training profile"
    yield Anchor("DeepSeek-V3, exchanges of F&B", 113.4, 4e3 * here.exchange(way), "ms", source)
    yield Anchor("DeepSeek-V3, F&B", 129.0, 4e3 * here.seconds(way), "ms", source)
    yield Anchor("DeepSeek-V3, hidden", 0.963, here.hidden(way), "of the exchanges", source)
