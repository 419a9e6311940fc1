"""A card and a block of round numbers."""

from moe_jax.predict.hardware import Card, Link
from moe_jax.predict.layouts.block import Block, Level
from moe_jax.predict.layouts.block_work import PRODUCT_SHARE, BlockWork, Cluster
from moe_jax.predict.layouts.exchange import Exchange

BASE = 8.4e-6
"""Seconds of any collective without hops (moe_jax/predict/collectives.py)."""


def link(rate: float) -> Link:
    """Without hops."""
    return Link("toy", rate, rate, 0.0, 0.0)


def cluster(devices: int, *, node: int = 8, inside: float = 1e9, outside: float = 1e8) -> Cluster:
    """Products at 1 TFLOP/s, memory at 1 TB/s, 10 GB."""
    card = Card(
        name="toy",
        description="toy",
        sources=(),
        capability=9.0,
        peak_flops=1e13,
        node=node,
        link=link(inside),
        network=link(outside),
        host_link=link(1e9),
        xla={"memory_bandwidth": 1e12 / 0.9, "device_memory_size": 1e10},
        gemm_flops=1e12 / PRODUCT_SHARE,
    )
    return Cluster(card, devices)


BLOCK = Block(
    width=1000,
    experts=4,
    per_token=2,
    expert_weights=4_000_000,
    other_weights=1_000_000,
    scores=500_000.0,
    levels={
        "none": Level(kept=40_000, pending=20_000, again=0.0),
        "selective": Level(kept=10_000, pending=20_000, again=1_000_000.0),
        "full": Level(kept=2_000, pending=50_000, again=6_500_000.0),
    },
)
"""3 million active parameters: F is 6.5, Bi 7 and W 6 MFLOP a token."""


def work(devices: int = 8, tokens: int = 1000, axis: int = 1, **rest) -> BlockWork:
    """The block for 1000 tokens: F takes 6.5 ms, Bi 7 ms and W 6 ms."""
    recompute = rest.pop("recompute", "none")
    route = Exchange(chunks=rest.pop("chunks", 1), fp8=rest.pop("fp8", False))
    return BlockWork(BLOCK, cluster(devices, **rest), tokens, axis, recompute, route)
