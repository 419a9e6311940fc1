"""How parameters, and what belongs to them, lie on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.model.parameters import dotted, kind_of
from moe_jax.parallel.rules import place


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The layout of every array of a state, by the letters of its parameter (parallel.rules).

    Moments of an optimizer lie as their parameters. Vectors and numbers are whole on every device.
    UserError: a large array would be.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(mesh, path, leaf.shape)), tree
    )


def spec_of(mesh: Mesh, path: tuple[Any, ...], shape: tuple[int, ...]) -> P:
    """The layout of one array. The leading axis of stacked layers is split over the pipeline.

    It is whole where the pipeline's devices do not divide the layers. Those are no layers of its
    stages.
    """
    if len(shape) < 2:
        return P()
    name = dotted(path)
    letters = kind_of(name).axes.split()
    stacked = len(shape) - len(letters)
    pipe = mesh.shape.get("pipe", 1)
    layers = "pipe" if stacked and pipe > 1 and shape[0] % pipe == 0 else None
    return P(*[layers] * stacked, *place(letters, shape[stacked:], dict(mesh.shape), name))
