"""What the prediction knows of GPUs."""

from typing import NamedTuple

VERSION = "launch model 2, 2026-11-26"
"""Of the model. Recorded predictions name it, so that a run is compared with the right one.

1: forward launches, the backward pass at twice the forward's time. 2: every launch by itself."""

LAUNCH = 3e-6
"""Seconds between dependent launches."""


class Device(NamedTuple):
    """A GPU's rates."""

    name: str
    arch: int
    """The compute capability times ten."""
    multiprocessors: int
    gemm: float
    """FLOP/s that a large 16-bit product reaches (published measurements, not the data sheet)."""
    memory: float
    """Bytes per second of DRAM."""
    l2_bytes: float
    l2_rate: float
    """Bytes per second of L2 to all multiprocessors: 5120 bytes a clock at the boost clock. It is
    the model's most sensitive number."""
    l2_rate_low: float
    """The lowest rate that is reported for the L2 of an H100, 5.5 TB/s, and the same share of
    `l2_rate` on another GPU."""
    latency: float
    """Seconds from a load to its data, from DRAM."""
    special: float
    """Special-function results per second of a multiprocessor. It has eight times as many
    multiplications with additions."""


H100 = Device(
    name="H100 SXM",
    arch=90,
    multiprocessors=132,
    gemm=795e12,
    memory=3.35e12,
    l2_bytes=50e6,
    l2_rate=5120 * 1.755e9,
    l2_rate_low=5.5e12,
    latency=6e-7,
    special=16 * 1.755e9,
)
A100 = Device(
    name="A100 80GB",
    arch=80,
    multiprocessors=108,
    gemm=250e12,
    memory=2.0e12,
    l2_bytes=40e6,
    l2_rate=5120 * 1.41e9,
    l2_rate_low=4.4e12,
    latency=6e-7,
    special=16 * 1.41e9,
)
DEVICES = {"H100": H100, "A100": A100}


def other_seconds(moved: float, flops: float, device: Device) -> float:
    """Seconds of a launch that is as fast as memory and the plain GEMM allow."""
    return max(moved / device.memory, flops / device.gemm) + LAUNCH
