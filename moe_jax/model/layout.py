"""How parameters, and what belongs to them, lie on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.model.parameters import dotted, kind_of
from moe_jax.parallel.rules import place, within_experts


def shardings(mesh: Mesh, tree: Any, whole_experts: bool = True) -> Any:
    """The layout of every array of a state, by the letters of its parameter (parallel.rules).

    Moments of an optimizer lie as their parameters. Vectors and numbers are whole on every device.
    Without `whole_experts`, every device has a part of every routed expert (parallel.fetch).
    UserError: a large array would be whole on every device.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(mesh, path, leaf.shape, whole_experts)), tree
    )


def spec_of(
    mesh: Mesh, path: tuple[Any, ...], shape: tuple[int, ...], whole_experts: bool = True
) -> P:
    """The layout of one array. The leading axis of stacked layers is split over the pipeline.

    It is whole where the pipeline's devices do not divide the layers. Those are no layers of its
    stages.
    """
    if len(shape) < 2:
        return P()
    name = dotted(path)
    kind = kind_of(name)
    letters = kind.axes.split()
    if kind.role == "expert" and not whole_experts:
        letters = within_experts(letters)
    stacked = len(shape) - len(letters)
    pipe = mesh.shape.get("pipe", 1)
    layers = "pipe" if stacked and pipe > 1 and shape[0] % pipe == 0 else None
    return P(*[layers] * stacked, *place(letters, shape[stacked:], dict(mesh.shape), name))
