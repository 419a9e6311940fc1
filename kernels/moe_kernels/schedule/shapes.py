"""Sizes of the schedule's programs."""

from typing import NamedTuple

from moe_kernels.launch import Tuning


class Sizes(NamedTuple):
    """What a program of each kernel holds."""

    chunk: int = 128
    """Assignments that are compared with each other, all pairs."""
    step: int = 16
    """Assignments that the histogram compares with all experts at a time."""
    scan_chunks: int = 128
    """Chunks of a step of the scan, for ..."""
    scan_experts: int = 8
    """... so many experts: 32 bytes of a row of the histogram, the least that memory reads."""
    tuning: Tuning = Tuning(4, 1)


SIZES = Sizes()
