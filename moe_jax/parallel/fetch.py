"""Each device's experts, fetched from devices that have a part of every expert.

Where experts change their devices, their parameters do not: every device keeps the same part of
every expert, for example D / G rows of each matrix. One all-to-all then brings a device whole
matrices of any experts, each for as many bytes as it has. A new placement moves no state.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.parallel.gather import Axes, axes_of, join, split
from moe_jax.parallel.mesh import EXPERT, manual_axes, own_copies


class _Way(NamedTuple):
    """How matrices are fetched: hashable, as custom_vjp wants its static arguments."""

    dimension: int
    """Dimension of the matrices that is split over the axis EXPERT."""
    inner: Axes
    """The axes inside of EXPERT, over which each dimension is gathered before."""
    outer: Axes
    """The axes outside of EXPERT, over which it is gathered afterwards."""
    others: tuple[str, ...]
    """The axes on which every device has the same part."""
    dtype: jnp.dtype
    gradient: jnp.dtype


def fetch(
    part: Float[Array, "E *shape"],
    slots: Int[Array, "slots"],
    spec: P,
    dtype: jnp.dtype,
    gradient: jnp.dtype,
    keep: tuple[str, ...] = (),
) -> Float[Array, "N *shape"]:
    """The matrices of this device's slots in `dtype`, of which `spec` gives each device a part.

    `slots` has the expert in each slot of all devices of EXPERT, the first device's first. `spec`
    splits a dimension other than E over that axis. Parts are cast before they are sent. The
    gradient of a matrix is each device's own. It is cast to `gradient`, sent back, and summed over
    the expert's slots and over all other axes of the shard_map. A dimension stays split over the
    axes in `keep`. UserError: `spec` splits no dimension over EXPERT.
    """
    names = axes_of(spec)
    others = tuple(axis for axis in manual_axes() if not any(axis in axes for axes in names))
    names = tuple(tuple(one for one in axes if one not in keep) for axes in names)
    dimension = next((d for d, axes in enumerate(names) if EXPERT in axes), -1)
    require(dimension >= 0, f"parallel.expert splits no dimension of experts {part.shape}")
    inner = list(names)
    outer: list[tuple[str, ...]] = [() for _ in names]
    place = names[dimension].index(EXPERT)
    outer[dimension] = names[dimension][:place]
    inner[dimension] = names[dimension][place + 1 :]
    dtypes = (jnp.dtype(dtype), jnp.dtype(gradient))
    way = _Way(dimension, tuple(inner), tuple(outer), others, *dtypes)
    return _fetch(part, slots, way)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fetch(part: Array, slots: Array, way: _Way) -> Array:
    return _forward(part, slots, way)[0]


def _forward(part: Array, slots: Array, way: _Way) -> tuple[Array, tuple[Array, Array]]:
    own = join(part.astype(way.dtype), way.inner)
    sent = jnp.take(own, slots, axis=0)
    # Slots are split over the devices, and the parts that arrive are put together.
    whole = lax.all_to_all(sent, EXPERT, 0, way.dimension, tiled=True)
    whole = join(whole, way.outer)
    # Marked as each device's own, because each gives its own part of the gradient.
    return own_copies(whole, way.others), (slots, jnp.zeros((0, len(part)), part.dtype))


def _backward(way: _Way, saved: tuple[Array, Array], whole: Array) -> tuple[Array, None]:
    slots, like = saved
    received = split(whole.astype(way.gradient), way.outer)
    received = lax.all_to_all(received, EXPERT, way.dimension, 0, tiled=True)
    part = split(_sum_of_slots(received, slots, like.shape[1]), way.inner)
    if way.others:
        part = lax.psum(part, way.others)
    return part.astype(like.dtype), None


_fetch.defvjp(_forward, _backward)


def _sum_of_slots(
    of_slots: Float[Array, "slots *shape"], slots: Int[Array, "slots"], experts: int
) -> Float[Array, "E *shape"]:
    """The sum over each expert's slots. Every expert has one at least."""
    # No scatter-add: on a GPU the order of its sums may change from run to run.
    order = jnp.argsort(slots, stable=True)
    grouped = slots[order]
    first = jnp.searchsorted(grouped, jnp.arange(experts))
    again = jnp.nonzero(jnp.diff(grouped, prepend=-1) == 0, size=len(slots) - experts)[0]

    def add(sums: Array, replica: tuple[Array, Array]) -> tuple[Array, None]:
        expert, slot = replica
        return sums.at[expert].add(of_slots[slot]), None

    start = jnp.take(of_slots, order[first], axis=0)
    return lax.scan(add, start, (grouped[again], order[again]))[0]
