"""What a gate computes, and the tile that a program computes it in."""

from typing import Literal, NamedTuple

from moe_kernels.launch import Tuning, power_of_two

FUNCTIONS = ("softmax", "sigmoid")


class Choice(NamedTuple):
    """How scores become choices and weights."""

    per_token: int
    """Experts of a token (K)."""
    function: Literal["softmax", "sigmoid"] = "sigmoid"
    """Affinities from logits."""
    normalise: bool = True
    """Divide the K weights by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    groups: int = 1
    """Groups of E / groups neighbouring experts, ..."""
    groups_per_token: int = 1
    """... of which a token may use this many, ..."""
    representatives: int = 1
    """... the best by the sum of so many of their best scores."""


class Tile(NamedTuple):
    """The part of the scores that a program holds: tokens x groups x experts of a group, each a
    power of two."""

    tokens: int
    groups: int
    size: int
    tuning: Tuning


# A warp a program holds whole rows, 32 scores a lane: no reduction crosses a warp, so none needs
# shared memory or a barrier. Beyond 1024 experts a row has several warps.
SCORES = 1024


def tile(tokens: int, experts: int, groups: int) -> Tile:
    """As many tokens as fit in SCORES, at most 32."""
    across, size = power_of_two(groups), power_of_two(experts // groups)
    rows = max(1, min(32, SCORES // (across * size), power_of_two(tokens)))
    return Tile(rows, across, size, Tuning(max(1, min(8, across * size // SCORES)), 1))
