"""How the arrays of a run are laid out on a mesh: one table from letters to the mesh's axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import require
from moe_jax.parallel.mesh import BATCH, TENSOR

PLACES: dict[str, tuple[str, ...]] = {
    TENSOR: ("F", "H·A", "V", "D"),
    "expert": ("E", "D", "R", "V", "H·A", "F", "2D", "2F"),
    "fsdp": ("D", "R", "H·A", "V", "F", "2D", "E", "2F"),
}
"""By axis of the mesh: which dimension of a parameter it splits. The first that it divides is
taken. Letters are those of model.parameters. `data` splits no parameter.

An axis further up is the outer one where two split one dimension. 2F is a gate half and an up half.
A device of the tensor axis needs the same columns of both, so that axis never splits it."""
TENSOR_SPLITS = ("F", "H·A", "V", "2F")
"""Parameters without one of these letters are the same on all devices of the tensor axis."""
SMALL = 1 << 20
"""Up to so many elements a parameter that no axis divides may be whole on every device."""


def within_experts(letters: Sequence[str]) -> list[str]:
    """The letters of stacked experts, each of which is split. No axis splits their number."""
    return ["whole E" if letter == "E" else letter for letter in letters]


def place(
    letters: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int], name: str = ""
) -> P:
    """The layout of a parameter whose dimensions have these letters.

    A dimension may be split over several axes. Vectors are whole on every device. UserError: an
    axis above 1 divides no dimension of a parameter of more than SMALL elements.
    """
    split: list[list[str]] = [[] for _ in letters]
    left = list(shape)
    for axis, places in PLACES.items():
        size = sizes.get(axis, 1)
        if size == 1 or len(letters) == 1:
            continue
        if axis == TENSOR and not set(letters) & set(TENSOR_SPLITS):
            continue
        fitting = (
            letters.index(letter)
            for letter in places
            if letter in letters and left[letters.index(letter)] % size == 0
        )
        dimension = next(fitting, None)
        require(
            dimension is not None or math.prod(shape) <= SMALL,
            f"parallel.{axis}={size} divides no dimension of {name or 'a parameter'} "
            f"{tuple(shape)} ({' '.join(letters)}), which would be whole on every device: choose "
            "a divisor of one of them, or another axis",
        )
        if dimension is not None:
            split[dimension].append(axis)
            left[dimension] //= size
    return P(*(tuple(axes) if len(axes) > 1 else (axes[0] if axes else None) for axes in split))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the axes that share it."""
    return NamedSharding(mesh, P(BATCH))


def with_sharding(abstract: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes, each with the sharding that its array is to have.

    `shardings` is one for all, or a tree of them.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
        abstract,
        shardings,
    )


def device_bytes(tree: Any) -> int:
    """Bytes that each device has of a tree of shapes, dtypes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
