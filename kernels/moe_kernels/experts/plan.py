"""The arrays of a dispatch plan that the kernels of the experts read."""

from typing import Protocol

from jax import Array
from jaxtyping import Int


class Plan(Protocol):
    """R rows in blocks of one expert each, for S = T·K assignments numbered t·K + k.

    moe_kernels.schedule.Schedule is one. A Protocol lets callers pass a class of their own.
    """

    @property
    def counts(self) -> Int[Array, "E"]:
        """Rows of each expert."""
        ...

    @property
    def starts(self) -> Int[Array, "E"]:
        """First row of each expert, a multiple of block_rows."""
        ...

    @property
    def assignment(self) -> Int[Array, "R"]:
        """The assignment of a row, S where it is padding."""
        ...

    @property
    def row(self) -> Int[Array, "T K"]:
        """The row of an assignment, R where it has none."""
        ...

    @property
    def experts(self) -> Int[Array, "T K"]:
        """The expert of each assignment, E where it has no row."""
        ...

    @property
    def block_expert(self) -> Int[Array, "blocks"]:
        """The expert of each block."""
        ...

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        ...
