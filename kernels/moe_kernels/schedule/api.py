"""The arrays that every kernel of the experts reads its rows from."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array, ShapeDtypeStruct
from jaxtyping import Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """R rows in blocks of one expert each; S = T·K assignments, numbered t·K + k."""

    counts: Int[Array, "E"]
    """Rows of each expert."""
    starts: Int[Array, "E"]
    """Its first row, a multiple of block_rows."""
    assignment: Int[Array, "R"]
    """The assignment of a row, S where it is padding."""
    row: Int[Array, "T K"]
    """The inverse; R where the assignment has no row."""
    experts: Int[Array, "T K"]
    """The expert of each assignment, E where it has no row."""
    block_expert: Int[Array, "blocks"]
    """The expert of each block."""
    block_rows: int = dataclasses.field(metadata={"static": True})
    """Rows of a block."""


def schedule_shape(tokens: int, per_token: int, experts: int, block_rows: int) -> Schedule:
    """Shapes alone, for tracing: floor(S / block_rows) + min(E, S) blocks suffice for any routing
    without drops."""
    assignments = tokens * per_token
    blocks = assignments // block_rows + min(experts, assignments)

    def integers(*shape: int) -> Any:
        return ShapeDtypeStruct(shape, "int32")

    return Schedule(
        integers(experts),
        integers(experts),
        integers(blocks * block_rows),
        integers(tokens, per_token),
        integers(tokens, per_token),
        integers(blocks),
        block_rows,
    )
