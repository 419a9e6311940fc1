"""The row of the expert-sorted order that computes each assignment."""

from moe_kernels.schedule.api import (
    Schedule,
    block_count,
    choose_block_rows,
    schedule,
    schedule_shape,
)

__all__ = ["Schedule", "block_count", "choose_block_rows", "schedule", "schedule_shape"]
