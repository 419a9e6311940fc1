"""A pipeline schedule as data: which device does what, in which order. Pure Python, no JAX.

The words, as everywhere in this folder:

- A *stage* is 1/P of the model. It is the unit of costs, of activations and of weights.
- A *piece* is what one device computes at once: a stage, or 1/v of a stage. Pieces are numbered in
  the order of the model.
- A *chunk* is a device's own number of a piece that lies on it.
- A *path* is the places (device, chunk) through which a micro-batch goes, piece by piece.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from moe_jax.base.errors import UserError, require


class Kind(IntEnum):
    """What a device does with a micro-batch and a chunk. 0 is left to mean idle in tables."""

    FORWARD = 1
    BACKWARD = 2
    """Gradients of the input and of the weights at once. The first is sent when both are done."""
    BACKWARD_INPUT = 3
    BACKWARD_WEIGHT = 4


class Operation(NamedTuple):
    """One kind of work for one micro-batch and one chunk of the device that does it."""

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of micro-batch {self.microbatch}, chunk {self.chunk}"


Step = tuple[Operation, ...]
"""What a device does at once: one operation, or a forward and a backward that overlap."""
Order = tuple[Step, ...]
"""All steps of a device, one after the other."""


class Place(NamedTuple):
    """Where a piece of the model lies."""

    device: int
    chunk: int


Path = tuple[Place, ...]
"""The place of piece 0, of piece 1, … A device may appear twice in a row: it sends nothing then."""


@dataclass(frozen=True)
class PipelineSchedule:
    """Orders of operations for every device, and the paths of the micro-batches.

    It is checked when it is made (schedules/checks.py): one that exists can be run. An executor
    finds here where each piece of the model lies (`paths`), and in moe_jax/parallel/ticks.py what
    each device does, receives and stores at each tick.
    """

    name: str
    stages: int
    """P. The model is cut into P stages of equal cost."""
    microbatches: int
    """M, over all paths."""
    paths: tuple[Path, ...]
    """One path, or two of which each takes half of the micro-batches (DualPipe). Each path has the
    whole model, so two paths are two copies of it, whose gradients must be added."""
    orders: tuple[Order, ...]
    """Each device's steps."""

    def __post_init__(self) -> None:
        # Imported here, because the checks read schedules.
        from moe_jax.parallel.schedules.checks import check

        check(self)

    @property
    def devices(self) -> int:
        """Devices of the pipeline. P, but for DualPipeV, which has two stages on each of P/2."""
        return len(self.orders)

    @property
    def pieces(self) -> int:
        """Pieces into which the model is cut."""
        return len(self.paths[0])

    @property
    def piece_size(self) -> float:
        """A piece in stages. 1/v where a stage is cut into v pieces."""
        return self.stages / self.pieces

    @property
    def weights(self) -> float:
        """Stages whose weights lie on a device."""
        places = sum(len(path) for path in self.paths)
        return places * self.piece_size / self.devices

    @property
    def messages(self) -> int:
        """Activations and gradients that go from one device to another in one update."""
        halves = self.microbatches // len(self.paths)
        return sum(2 * halves * _crossings(path) for path in self.paths)

    @cached_property
    def positions(self) -> dict[Place, int]:
        """The number of the piece that lies at a place."""
        return {place: number for path in self.paths for number, place in enumerate(path)}

    def path_of(self, microbatch: int) -> Path:
        """The path of a micro-batch. With two paths, each has one half of the micro-batches."""
        return self.paths[microbatch * len(self.paths) // self.microbatches]

    def layers_of_piece(self, layers: int) -> int:
        """Layers of a piece of a model that has `layers`. UserError: they do not divide."""
        if layers < 1 or layers % self.pieces:
            raise UserError(
                f"{layers} layers cannot be cut into the {self.pieces} equal pieces of "
                f"{self.name} with {self.stages} stages: choose a multiple of {self.pieces}"
            )
        return layers // self.pieces


def _crossings(path: Path) -> int:
    return sum(here.device != there.device for here, there in pairwise(path))


def straight(devices: int, chunks: int = 1) -> Path:
    """Device 0 to the last one, `chunks` times around: piece c·devices + r is (r, c)."""
    return tuple(Place(r, c) for c in range(chunks) for r in range(devices))


def folded(devices: int) -> Path:
    """The letter V: down to the last device with chunk 0, and back with chunk 1."""
    down = tuple(Place(r, 0) for r in range(devices))
    back = tuple(Place(r, 1) for r in reversed(range(devices)))
    return down + back


def forward(microbatch: int, chunk: int = 0) -> Step:
    """A step of one forward."""
    return (Operation(Kind.FORWARD, microbatch, chunk),)


def backward(microbatch: int, chunk: int = 0) -> Step:
    """A step of one whole backward."""
    return (Operation(Kind.BACKWARD, microbatch, chunk),)


def backward_input(microbatch: int, chunk: int = 0) -> Step:
    """A step of one backward to the input."""
    return (Operation(Kind.BACKWARD_INPUT, microbatch, chunk),)


def backward_weight(microbatch: int, chunk: int = 0) -> Step:
    """A step of one backward to the weights."""
    return (Operation(Kind.BACKWARD_WEIGHT, microbatch, chunk),)


def require_one_chunk(name: str, chunks: int) -> None:
    """UserError: a schedule whose devices have one chunk was asked for more."""
    require(chunks == 1, f"{name} has one chunk a stage, not {chunks}: choose interleaved or zb-v")


def require_two_chunks(name: str, chunks: int) -> None:
    """UserError: more chunks than the two that a schedule always has. 1 is the default of build."""
    require(chunks <= 2, f"{name} has two chunks a device, not {chunks}: leave chunks out")


def require_microbatches(name: str, microbatches: int, least: int, stages: int) -> None:
    """UserError: too few micro-batches for the pattern of a schedule."""
    require(
        microbatches >= least,
        f"{name} with {stages} stages needs at least {least} micro-batches, not {microbatches}",
    )
