"""The lanes of one exchange: each lane's rows go, are computed, and come back.

With several lanes, one's rows travel while another's are computed. Their order is the program's, in
the backward pass as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int
from moe_kernels.experts import Source

from moe_jax.moe.hops import Lane


class Matrices(NamedTuple):
    """Experts."""

    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]


class Lot(NamedTuple):
    """The operands of one lane."""

    rows: Float[Array, "N D"]
    """To be sent, or received."""
    payload: Float[Array, "N columns"]
    """Of the rows that are received: their experts plus 1, 0 for none, and then their weights."""
    matrices: Matrices
    """Of the experts that compute the received rows."""


Compute = Callable[[Lane, Source | None, Lot], tuple[Array, Array]]
"""(a lane, where matrices are read, its received operands) -> (outputs [N, D], copies that waited
in further exchanges)."""


def there_and_back(
    compute: Compute, lanes: tuple[Lane, ...], lots: list[Lot], source: Source | None
) -> tuple[list[Float[Array, "N D"]], Int[Array, ""]]:
    """(each lane's outputs, at the devices that sent the rows, and copies that waited further on).

    `source` has no gradient.
    """
    result: Any = _there_and_back(compute, lanes, lots, source)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _there_and_back(
    compute: Compute, lanes: tuple[Lane, ...], lots: list[Lot], source: Source | None
) -> Any:
    return _send_all(compute, lanes, lots, source)[0]


def _send_all(
    compute: Compute, lanes: tuple[Lane, ...], lots: list[Lot], source: Source | None
) -> tuple[Any, list[Any]]:
    returned = []
    pulls = []
    waited = jnp.int32(0)
    for lane, lot in zip(lanes, lots, strict=True):
        received = lot._replace(rows=lane.send(lot.rows))
        y, pull, deeper = jax.vjp(partial(compute, lane, source), received, has_aux=True)
        returned.append(lane.transfer.back(y))
        pulls.append(pull)
        waited += deeper
    return (returned, waited), pulls


def _pull_all(
    compute: Compute, lanes: tuple[Lane, ...], pulls: list[Any], cotangents: Any
) -> tuple[list[Lot], None]:
    d_lots: list[Lot] = []
    for lane, pull, d_returned in zip(lanes, pulls, cotangents[0], strict=True):
        d_y = lane.transfer.there(d_returned)
        if d_lots:
            # One lane's products after the other's. Left to itself, XLA's scheduler takes the rows'
            # gradients of all lanes first, and has no product left for some of their transfers.
            last = d_lots[-1]
            d_y, done = lax.optimization_barrier((d_y, last.matrices))
            d_lots[-1] = last._replace(matrices=done)
        (d_lot,) = pull(d_y)
        d_lots.append(d_lot._replace(rows=lane.transfer.back(d_lot.rows)))
    return d_lots, None


_there_and_back.defvjp(_send_all, _pull_all)


def by_lane(matrices: Matrices, lanes: tuple[Lane, ...]) -> list[Matrices]:
    """The matrices of each lane's experts."""
    if lanes[0].experts >= len(matrices.down):
        return [matrices] * len(lanes)
    parts = (_cut(matrix, len(lanes)) for matrix in matrices)
    return [Matrices(*pair) for pair in zip(*parts, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(matrix: Float[Array, "E D N"], parts: int) -> tuple[Float[Array, "E D N"], ...]:
    """The matrices in equal parts. The gradient is one array, where autodiff adds padded ones."""
    return tuple(jnp.split(matrix, parts))


_cut.defvjp(
    lambda matrix, parts: (tuple(jnp.split(matrix, parts)), None),
    lambda parts, _, gradients: (jnp.concatenate(gradients),),
)
