"""How the quantiser's kernels are cut up."""

from moe_kernels.launch import Tuning

ROWS = 32
"""Rows of a program's tile of activations: 4,096 numbers, 16 bytes at a time."""
ROWS_TUNING = Tuning(warps=8, stages=2)
MATRICES_TUNING = Tuning(warps=16, stages=2)
"""32 numbers a thread, so that two programs fit on a multiprocessor; with 8 warps it is one (138
registers on sm_90), which waits for memory and then computes."""
