"""Expert parallelism: every device owns some of the experts, and tokens travel to them.

    route -> send -> local plan -> the same mixture -> return -> sum

It runs inside a shard_map, on each device's own tokens. The gate's weights travel with the rows. So
the outputs come back weighted, and the gradient of a weight is computed beside its expert.

The send buffer has a fixed size. Rows that do not fit go in further rounds, as many as the fullest
destination of any device needs, so that all devices take part in each. The result is that of the
one-device layer, whatever the routing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int
from moe_kernels.experts import Source

from moe_jax.config.exchange import ExchangeConfig
from moe_jax.moe.hops import Assigned, Hop, Lane, hops
from moe_jax.moe.lanes import Lot, Matrices, by_lane, there_and_back
from moe_jax.moe.plan import Plan, make_plan
from moe_jax.moe.precision import wide
from moe_jax.moe.slots import collect, fill, slots_of
from moe_jax.parallel.exchange import Level, gather, reduce
from moe_jax.parallel.mesh import largest


class Experts(NamedTuple):
    """The experts that a device owns, and where their matrices are read."""

    matrices: Matrices
    source: Source | None = None
    """None: in `matrices`. Otherwise these only receive the gradients (moe_kernels' mixture)."""


@dataclass(frozen=True)
class Sharding:
    """Where the experts lie, and how tokens get there and are computed. All of it is static."""

    axis: str
    """Mesh axis over which the experts are split, in order."""
    devices: int
    """Size of this axis."""
    exchange: ExchangeConfig
    mixture: Callable[..., Array]
    """The implementation of the experts."""
    kernels: bool = False
    """Whether Triton kernels make the plans."""
    in_place: bool = False
    """Whether the mixture reads matrices where they lie, among others (moe_kernels' Source)."""


class Path(NamedTuple):
    """The exchanges that are left, and what computes a row at their end. All of it is static."""

    hops: tuple[Hop, ...]
    sharding: Sharding
    work: int
    """Assignments of a device's experts, if the router is balanced."""


class Buffer(NamedTuple):
    """The copies of one exchange, ready to be sent in rounds."""

    plan: Plan
    """make_plan of their destinations."""
    rounds: Int[Array, ""]
    """Rounds until every copy of every device has been sent."""


def expert_parallel(
    x: Float[Array, "T D"], assigned: Assigned, experts: Experts, sharding: Sharding
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """(sum_k weights[t, k] · expert_k(x[t]), this device's copies that needed a further round).

    `assigned` numbers the experts of all devices, and `experts` are this device's own.
    """
    matrices, source = experts
    if sharding.in_place:
        source = lax.stop_gradient(source or Source(*matrices))
    experts = Experts(matrices, source)
    if sharding.exchange.kind == "all_gather":
        return _all_gathered(x, assigned, experts, sharding), jnp.int32(0)
    tokens, per_token = assigned.experts.shape
    own = len(matrices.down)
    path = hops(sharding.exchange, sharding.axis, sharding.devices, (tokens, per_token), own)
    return _exchanged(Path(path, sharding, tokens * per_token), x, assigned, experts)


def _mixture(
    rows: Array, assigned: Assigned, experts: Experts, sharding: Sharding, expected: int
) -> Array:
    """The outputs of rows that are here, by experts that are here."""
    own = len(experts.matrices.down)
    plan = make_plan(assigned.experts, own, kernels=sharding.kernels, expected=expected)
    source = () if experts.source is None else (experts.source,)
    return sharding.mixture(rows, assigned.weights, *experts.matrices, plan, *source)


def _all_gathered(x: Array, assigned: Assigned, experts: Experts, sharding: Sharding) -> Array:
    """Every device computes its experts' part of all tokens' outputs, and devices add them up."""
    level = Level(sharding.axis, sharding.devices)
    own = len(experts.matrices.down)
    local = gather(assigned.experts, level) - level.index() * own
    local = jnp.where((local >= 0) & (local < own), local, own)
    everyone = Assigned(local, gather(assigned.weights, level))
    expected = assigned.experts.size
    return reduce(_mixture(gather(x, level), everyone, experts, sharding, expected), level)


def _exchanged(path: Path, x: Array, assigned: Assigned, experts: Experts) -> tuple[Array, Array]:
    """expert_parallel through the exchanges that are left."""
    hop = path.hops[0]
    route = hop.route(assigned)
    copies = math.ceil(hop.destinations * hop.mean)
    kernels = path.sharding.kernels
    plan = make_plan(route.destination, hop.destinations, kernels=kernels, expected=copies)
    # Of each copy: its experts plus 1, 0 for none, and then their weights.
    numbers = (route.experts + 1).astype(route.weights.dtype)
    payload = jnp.concatenate([numbers, route.weights], axis=-1)
    payload = payload.reshape(-1, payload.shape[-1])
    # Of the devices that exchange with each other. Others may be elsewhere in the program.
    rounds = largest(-(-jnp.max(plan.load) // hop.size), (path.sharding.axis,))
    buffer = Buffer(plan, rounds)
    floats = (x, payload, by_lane(experts.matrices, hop.lanes))
    result: Any = _all_rounds(path, floats, (buffer, experts.source))
    out, deeper = result
    return out, deeper + jnp.sum(jnp.maximum(plan.load - hop.size, 0))


Floats = tuple[Array, Array, list[Matrices]]
"""The operands that an exchange is differentiated by: rows, payload, and each lane's matrices."""
Others = tuple[Buffer, Source | None]
"""Its other operands."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(path: Path, floats: Floats, others: Others) -> tuple[Array, Array]:
    """(the outputs of all rounds, the copies that waited in the exchanges after this one)."""
    return _further_rounds(path, floats, others, _round(path, 0, floats, others))


def _further_rounds(
    path: Path, floats: Floats, others: Others, first: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The first round's results with those of all others added."""
    if path.hops[0].rounds == 1:
        return first

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        index, total, waited = carry
        more, deeper = _round(path, index, floats, others)
        return index + 1, total + more.astype(total.dtype), waited + deeper

    out, waited = first
    start = (jnp.int32(1), out.astype(wide(out.dtype)), waited)
    _, total, waited = lax.while_loop(lambda carry: carry[0] < others[0].rounds, step, start)
    return total.astype(out.dtype), waited


def _save(path: Path, floats: Floats, others: Others) -> tuple[tuple[Array, Array], Any]:
    out, pull, waited = jax.vjp(lambda f: _round(path, 0, f, others), floats, has_aux=True)
    return _further_rounds(path, floats, others, (out, waited)), (pull, floats, others)


def _pull(path: Path, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Floats, None]:
    """The gradients of the first round, plus those of the others, which compute it all again."""
    pull_first, floats, others = saved
    d_out, _ = cotangents  # the other one is a count's
    (gradients,) = pull_first(d_out)
    if path.hops[0].rounds == 1:
        return gradients, None

    def step(carry: tuple[Array, Floats]) -> tuple[Array, Floats]:
        index, sums = carry
        _, pull, _ = jax.vjp(lambda f: _round(path, index, f, others), floats, has_aux=True)
        return index + 1, jax.tree.map(jnp.add, sums, pull(d_out)[0])

    start = (jnp.int32(1), gradients)
    _, gradients = lax.while_loop(lambda carry: carry[0] < others[0].rounds, step, start)
    return gradients, None


_all_rounds.defvjp(_save, _pull)


def _round(path: Path, index: Array | int, floats: Floats, others: Others) -> tuple[Array, Array]:
    """What the copies of one round add to the outputs, and the copies that waited further on."""
    x, payload, matrices = floats
    buffer, source = others
    lanes = path.hops[0].lanes
    slots = slots_of(buffer.plan, path.hops[0].size, index)
    rows = fill(x, slots, len(lanes))
    described = path.hops[0].send_small(fill(payload, slots.of_copies(), len(lanes)))
    operands = [Lot(*lot) for lot in zip(rows, described, matrices, strict=True)]
    returned, waited = there_and_back(partial(_lane, path), lanes, operands, source)
    return collect(tuple(returned), slots), waited


def _lane(path: Path, lane: Lane, source: Source | None, lot: Lot) -> tuple[Array, Array]:
    """The received rows' outputs: from this device's experts, or from a further exchange."""
    experts = Experts(lot.matrices, _from_first(source, lane))
    rows = lot.rows
    numbers, weights = jnp.split(lot.payload, 2, axis=-1)
    numbers = numbers.astype(jnp.int32)
    assigned = Assigned(jnp.where(numbers > 0, numbers - 1, lane.experts), weights)
    if path.hops[1:]:
        return _exchanged(path._replace(hops=path.hops[1:]), rows, assigned, experts)
    expected = math.ceil(path.work / len(path.hops[0].lanes))
    return _mixture(rows, assigned, experts, path.sharding, expected), jnp.int32(0)


def _from_first(source: Source | None, lane: Lane) -> Source | None:
    """The same source, numbered from the lane's first expert: the kernels get whole arrays and an
    offset, and no slice is copied."""
    return None if source is None else source._replace(first=source.first + lane.first)
