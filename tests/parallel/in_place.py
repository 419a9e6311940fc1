"""The model's experts read in place by the reference mixture, for any dtype.

It stands for the Triton kernels, which have no float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
from jax import Array, lax
from moe_kernels.experts import Source

from moe_jax.moe import implementation, reference, sharded


def mixture(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Any, source: Source | None = None
) -> Array:
    """reference.mixture. With a source, gate_up and down are not read and get the gradients."""
    if source is not None:
        gate_up = _instead(gate_up, _from(source, source.gate_up, gate_up))
        down = _instead(down, _from(source, source.down, down))
    return reference.mixture(x, weights, gate_up, down, plan)


def _from(source: Source, all_experts: Array, like: Array) -> Array:
    return lax.dynamic_slice_in_dim(all_experts, source.first, len(like))


@jax.custom_vjp
def _instead(unread: Array, read: Array) -> Array:
    return read


_instead.defvjp(lambda unread, read: (read, None), lambda _, gradient: (gradient, None))


@contextmanager
def reading_in_place() -> Iterator[list[int]]:
    """The experts of each source that a program traced inside reads."""
    seen = []

    def spy(*operands: Any) -> Array:
        seen.extend(len(source.down) for source in operands[5:])
        return mixture(*operands)

    with (
        patch.object(sharded, "_reads_sources", lambda config: True),
        patch.dict(implementation.IMPLEMENTATIONS, {"xla": spy}),
    ):
        yield seen
