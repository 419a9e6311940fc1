"""Rows sent between the devices of a mesh axis and back, inside a shard_map.

Every function here is linear and pure, and its transpose stands beside it: a transfer's gradient is
the transfer back. `ragged_all_to_all` is not used. XLA:CPU does not have it, and on GPUs its users
report crashes and NaN gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from jax import Array, lax
from jaxtyping import Int, Num

from moe_jax.config import ExchangeConfig

# Beside the mesh in force (jax.set_mesh): a layer is traced deep inside a model.
_in_force: ContextVar[ExchangeConfig | None] = ContextVar("exchange", default=None)


@contextmanager
def exchanging(config: ExchangeConfig) -> Iterator[None]:
    """Layers that are traced inside exchange tokens in this way."""
    token = _in_force.set(config)
    try:
        yield
    finally:
        _in_force.reset(token)


def exchange_in_force() -> ExchangeConfig:
    """That of `exchanging`, or the default."""
    return _in_force.get() or ExchangeConfig()


@dataclass(frozen=True)
class Level:
    """A group of devices that exchange rows, and this device's place in it.

    Without a `node`, it is the whole axis. With one, the axis is nodes of `node` neighbouring
    devices each, and the level is either the devices of a node (`inside`), or the devices that have
    the same place in their nodes.
    """

    axis: str
    """Name of the mesh axis."""
    devices: int
    """Size of the axis."""
    node: int = 0
    """Devices of a node. 0: the level is the whole axis."""
    inside: bool = False
    """Whether rows stay inside of a node."""

    @property
    def size(self) -> int:
        """Devices that exchange with each other (G)."""
        if not self.node:
            return self.devices
        return self.node if self.inside else self.devices // self.node

    @property
    def groups(self) -> list[list[int]] | None:
        """The axis' devices by group, as collectives take them. None: one group."""
        if not self.node:
            return None
        nodes = [[*range(i, i + self.node)] for i in range(0, self.devices, self.node)]
        return nodes if self.inside else [list(same) for same in zip(*nodes, strict=True)]

    def index(self) -> Int[Array, ""]:
        """This device's number in its group."""
        index = lax.axis_index(self.axis)
        if not self.node:
            return index
        return index % self.node if self.inside else index // self.node


class Transfer(NamedTuple):
    """A way for rows, and the way back, which is its inverse and its transpose."""

    there: Callable[[Num[Array, "N *shape"]], Num[Array, "N *shape"]]
    back: Callable[[Num[Array, "N *shape"]], Num[Array, "N *shape"]]


def all_to_all(level: Level) -> Transfer:
    """Rows are G equal blocks. Block g of device h becomes block h of device g."""
    if level.size == 1:
        return Transfer(lambda rows: rows, lambda rows: rows)

    def swap(rows: Num[Array, "N *shape"]) -> Num[Array, "N *shape"]:
        return lax.all_to_all(rows, level.axis, 0, 0, tiled=True, axis_index_groups=level.groups)

    return Transfer(swap, swap)


def shift(level: Level, distance: int) -> Transfer:
    """All rows of device g go to device (g + distance) mod G. Distance 0 sends nothing."""
    groups = level.groups or [list(range(level.size))]
    size = level.size

    def moved(by: int) -> Callable[[Array], Array]:
        pairs = [(group[i], group[(i + by) % size]) for group in groups for i in range(size)]
        return lambda rows: lax.ppermute(rows, level.axis, pairs)

    if distance % size == 0:
        return Transfer(lambda rows: rows, lambda rows: rows)
    return Transfer(moved(distance), moved(-distance))


def gather(rows: Num[Array, "N *shape"], level: Level) -> Num[Array, "G*N *shape"]:
    """The rows of all devices, in order. Its transpose is `reduce`."""
    return lax.all_gather(rows, level.axis, tiled=True, axis_index_groups=level.groups)


def reduce(rows: Num[Array, "G*N *shape"], level: Level) -> Num[Array, "N *shape"]:
    """This device's part of the sum over devices. Its transpose is `gather`."""
    return lax.psum_scatter(rows, level.axis, tiled=True, axis_index_groups=level.groups)
