"""How the arrays of a run are laid out on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel.mesh import DATA


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data axis."""
    return NamedSharding(mesh, P(DATA))


def with_sharding(abstract: Any, sharding: Sharding) -> Any:
    """A tree of shapes and dtypes, each with the sharding that its array is to have."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )
