"""The experts' forward pass on FP8 operands. Gradients are by the 16-bit kernels of experts/."""

from moe_kernels.experts_fp8.api import mixture

__all__ = ["mixture"]
