"""How the quantiser's kernels are cut up."""

from moe_kernels.launch import Tuning

ROWS = 32
"""Rows of a program's tile of activations: 4,096 numbers, 16 bytes at a time."""
ROWS_TUNING = Tuning(warps=4, stages=2)
MATRICES_TUNING = Tuning(warps=8, stages=2)
"""A block of 128x128 is 64 numbers a thread."""
