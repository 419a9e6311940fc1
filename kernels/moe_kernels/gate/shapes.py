"""The tile of scores that one program of the gate computes."""

from typing import NamedTuple

from moe_kernels.launch import Tuning, next_power_of_two

# One warp a program holds whole rows, 32 scores a lane. No reduction crosses a warp then, so none
# needs shared memory or a barrier. Beyond 1024 experts a row has several warps.
SCORES = 1024


class Tile(NamedTuple):
    """Tokens x groups x experts of a group, each a power of two."""

    tokens: int
    groups: int
    size: int
    tuning: Tuning


def gate_tile(tokens: int, experts: int, groups: int) -> Tile:
    """As many tokens as fit in SCORES, at most 32."""
    padded_groups = next_power_of_two(groups)
    size = next_power_of_two(experts // groups)
    row = padded_groups * size
    rows = max(1, min(32, SCORES // row, next_power_of_two(tokens)))
    # One stage: the kernel has no loop over memory that could be pipelined.
    return Tile(rows, padded_groups, size, Tuning(warps=max(1, min(8, row // SCORES)), stages=1))
