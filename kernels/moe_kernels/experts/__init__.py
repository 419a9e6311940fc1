"""The experts of a mixture: grouped SwiGLU with gathered inputs, forward and backward."""

from moe_kernels.experts.api import Schedule, combine, grouped, mixture

__all__ = ["Schedule", "combine", "grouped", "mixture"]
