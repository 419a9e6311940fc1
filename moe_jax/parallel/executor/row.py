"""What a device reads of the table of ticks (parallel.ticks) in one tick."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moe_jax.parallel.ticks import Part, TickTable


class Step(NamedTuple):
    """A device's cell of parallel.ticks.Part."""

    microbatch: Array
    chunk: Array
    inbox: Array
    saved: Array
    pending: Array


class Row(NamedTuple):
    """A device's cell of the table."""

    kind: Array
    forward: Step
    backward: Step
    slots: tuple[Array, ...]
    """Of each channel: where the message that comes in is stored."""


def rows_of(table: TickTable) -> Row:
    """The table as arrays [ticks, G]."""

    def step(part: Part) -> Step:
        return Step(*(jnp.asarray(getattr(part, name)) for name in Step._fields))

    slots = tuple(jnp.asarray(channel.slots) for channel in table.channels)
    return Row(jnp.asarray(table.kinds), step(table.forward), step(table.backward), slots)
