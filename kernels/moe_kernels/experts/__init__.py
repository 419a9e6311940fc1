"""The experts of a mixture: grouped SwiGLU with gathered inputs, forward and backward."""

from moe_kernels.experts.api import combine, grouped, mixture
from moe_kernels.experts.plan import Plan

__all__ = ["Plan", "combine", "grouped", "mixture"]
