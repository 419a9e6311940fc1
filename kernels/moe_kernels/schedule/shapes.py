"""Sizes of the schedule's programs."""

from typing import NamedTuple

from moe_kernels.launch import Tuning


class Sizes(NamedTuple):
    """The part of the assignments that a program of each kernel takes."""

    chunk: int = 128
    """Assignments that are compared with each other, all pairs."""
    step: int = 16
    """Assignments that the histogram compares with all experts at a time."""
    scan_chunks: int = 128
    """Chunks that the scan adds in one step."""
    scan_experts: int = 8
    """Experts of one program of the scan: 32 bytes of a row of the histogram, the least that memory
    reads."""
    tuning: Tuning = Tuning(warps=4, stages=1)


SIZES = Sizes()
