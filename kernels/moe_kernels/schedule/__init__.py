"""Which row of the expert-sorted order computes which assignment."""

from moe_kernels.schedule.api import Schedule

__all__ = ["Schedule"]
