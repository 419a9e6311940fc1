"""Which row of the expert-sorted order computes which assignment."""

from moe_kernels.schedule.api import Schedule, block_count, schedule

__all__ = ["Schedule", "block_count", "schedule"]
