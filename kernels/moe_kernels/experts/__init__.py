"""The experts of a mixture: grouped SwiGLU with gathered inputs, forward and backward."""

from moe_kernels.experts.api import Source, combine, grouped, mixture
from moe_kernels.experts.plan import Plan

__all__ = ["Plan", "Source", "combine", "grouped", "mixture"]
