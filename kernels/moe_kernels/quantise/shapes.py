"""Sizes of the quantisers' programs."""

from moe_kernels.launch import Tuning

ROWS = 32
"""Rows of a program's tile of activations: 32 x 128 numbers, 16 of them a thread."""
ROWS_TUNING = Tuning(warps=8, stages=2)
MATRICES_TUNING = Tuning(warps=16, stages=2)
"""32 numbers a thread, so that two programs fit on a multiprocessor. With 8 warps only one fits
(138 registers on sm_90), and nothing runs while it waits for memory."""
