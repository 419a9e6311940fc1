"""The right to compute with a fetched expert, until the store's next fetch."""

import jax
from jax import Array

from moe_jax.placement.memory import Expert


class Lease:
    """A fetched expert's matrices, whose memory is read into again after the store's next fetch.

    JAX computes asynchronously, so a computation with the matrices may still be running then.
    `used_by` registers its output, and the next fetch waits for it. AssertionError: the matrices
    are asked for after that fetch has begun.
    """

    def __init__(self, matrices: Expert) -> None:
        self._matrices: Expert | None = matrices
        self._outputs: list[Array] = []

    @property
    def matrices(self) -> Expert:
        """(gate_up [D, 2F], down [F, D])"""
        assert self._matrices is not None, "the expert was fetched before the last fetch"
        return self._matrices

    def used_by(self, output: Array) -> Array:
        """Returns `output`, an array computed from the matrices."""
        self._outputs.append(output)
        return output

    def end(self) -> None:
        """Waits for the outputs and takes the matrices away."""
        jax.block_until_ready(self._outputs)  # ready by then, as a rule: the next layer used them
        self._outputs = []
        self._matrices = None
