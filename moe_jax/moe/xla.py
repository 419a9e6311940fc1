"""Steps 3 to 5 in plain XLA, fast on a CPU: a batched product of equal shares, a loop for the rest.

Every expert's first C rows go through one batched product [E, C, D] x [E, D, 2F]. C is the mean
load and two standard deviations of a balanced router's load. Rows of a hot expert beyond C go
through two loops, with turns of 256 rows and of at most 64. A loop takes as many turns as the batch
needs, each with one expert's matrices. So nothing is dropped, and the worst routing costs only its
rows. Where an expert has fewer than C rows, the product also computes rows of its neighbour. These
results are never read and have weight 0 in the gradients, so no mask touches the activations.

The backward pass keeps x, the pre-activation z of the batched product, and the routing. The output
of the second product is not kept. With dA' = dO down^T, the gradient of the gate's weight is the
row sum of dA' · A, as in SonicMoE (arXiv:2512.14080), where A is recomputed from z. The loop keeps
nothing and recomputes its z. In 16 bits it adds in float32.

Why this design: rates as fractions of the rate of a batched GEMM of the same FLOPs, at T=2048,
D=512, F=256, E=64, K=6 in float32 on two cores. A line gives forward, then forward + backward.

    one trial of the layer
      this design                                                0.77   0.88
      one standard deviation in C, turns of 128 rows             0.75   0.70
      the loop alone, turns of 256 rows                          0.60   0.65
      the loop alone, turns of 224 rows                          0.73   0.70
    another trial, with balanced logits
      C of one standard deviation                                0.87   0.95
      C of twice the mean load                                   0.54   0.58
    experiments/moe_layer/run.py, beside other libraries
      this design                                                0.76   0.77
      blocks of 128 rows, each with a copy of the matrices       0.40   0.36
      jax.lax.ragged_dot                                         0.014

Of the forward pass, the up-projection takes 51%, the down-projection 32%, routing and plan 4%, the
gather 3% and the sum 2%. XLA's product with a transposed left operand, which the gradients of the
matrices need, runs at two thirds of the rate of the others. Transposing x before it costs less than
that loses (3% of the backward pass). Transposing the activations as well gains nothing.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.moe.experts import swiglu
from moe_jax.moe.gradients import Gradients, Totals, add_to_matrices, pull_rows
from moe_jax.moe.plan import Plan
from moe_jax.moe.precision import NONE, Rounding, wide

State = TypeVar("State")


class Rows(NamedTuple):
    """Rows that one product computes: [E, C] in the batch, [n] in a turn of the loop."""

    assignment: Int[Array, "*rows"]
    """t·K + k, or S where the row is not the expert's own. S is out of range: writes drop it."""
    token: Int[Array, "*rows"]
    """t, or T where the row is not the expert's own. T is out of range: writes drop it."""
    source: Int[Array, "*rows"]
    """The token whose vector is read. It is in range for every row, also for those not used."""
    weight: Float[Array, "*rows"]
    """The gate's weight, or 0 where the row is not the expert's own."""


class Slots(NamedTuple):
    """The place of each assignment in the batched product."""

    index: Int[Array, "T K"]
    """Row of the flat [E · C] batch. 0 where the assignment is not in the batch."""
    inside: Bool[Array, "T K"]
    """Whether the batch has it. Otherwise a loop computes it, or it was dropped."""


def batch_share(assignments: int, experts: int, tokens: int) -> int:
    """Rows of every expert in the batched product (C): S/E + 2 sqrt(S/E), in eights, at most T.

    0 where an expert has fewer than 4 rows on average, as in decoding. Then the loop does it all,
    and reads the matrices of the used experts alone.
    """
    mean = assignments / experts
    return min(tokens, 8 * math.ceil((mean + 2 * mean**0.5) / 8)) if mean >= 4 else 0


def turn_sizes(share: int, tokens: int) -> tuple[int, ...]:
    """Rows in a turn of each loop: 256 for large overloads, then 8 to 64 for what is left.

    The small size is the power of two above a quarter of the share, and at most T.
    """
    small = min(tokens, max(8, min(64, 1 << (share // 4).bit_length())))
    return (256, small) if tokens >= share + 256 else (small,)


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
    *,
    rounding: Rounding = NONE,
) -> Float[Array, "T D"]:
    """out[t] = sum_k weights[t, k] · swiglu(x[t] gate_up[e]) down[e], e the k-th expert of t.

    Sums are taken in float32 and in a fixed order, so the result is the same bit for bit from run
    to run. It equals reference.mixture up to rounding. With a `rounding`, the operands of both
    products are rounded first. The gradients are then those of the exact formula, at the z that the
    rounded operands gave.
    """
    return _mixture(x, weights, gate_up, down, plan, rounding)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mixture(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, rounding: Rounding
) -> Array:
    return _forward(x, weights, gate_up, down, plan, rounding)[0]


def _forward(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, rounding: Rounding
) -> tuple[Array, Array | None]:
    """(out, z of the batch [E, C, 2F], or None where there is no batch)"""
    share = _share(plan)
    dtype = x.dtype
    out = jnp.zeros_like(x, wide(dtype))
    z = None
    x = rounding.rows(x)
    gate_up = rounding.matrices(gate_up, 2)
    down = rounding.matrices(down, 1)
    if share:
        rows = _batch_rows(plan, weights, share)
        z = _take(x, rows.source) @ gate_up  # [E, C, D] @ [E, D, 2F]
        y = (rounding.rows(swiglu(z)) @ down).astype(dtype)
        slots = _slots(plan, share)
        out = _sum_slots(y, slots, jnp.where(slots.inside, weights, 0.0))

    def turn(expert: Array, rows: Rows, out: Array) -> Array:
        hidden = swiglu(_take(x, rows.source) @ gate_up[expert])
        y = (rounding.rows(hidden) @ down[expert]).astype(dtype)
        weighted = rows.weight[:, None] * y.astype(wide(dtype))
        return out.at[rows.token].add(weighted, mode="drop")

    out = _loop(plan, weights, share, turn, out)
    return out.astype(dtype), z if z is None else z.astype(dtype)


def _save(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, rounding: Rounding
) -> tuple[Array, tuple[Array | Plan | None, ...]]:
    out, z = _forward(x, weights, gate_up, down, plan, rounding)
    return out, (x, z, weights, gate_up, down, plan)


def _backward(
    rounding: Rounding,
    saved: tuple[Array, Array | None, Array, Array, Array, Plan],
    d_out: Array,
) -> tuple[Array, Array, Array, Array, None]:
    x, z, weights, gate_up, down, plan = saved
    share = _share(plan)
    sums = Gradients(
        x=jnp.zeros_like(x, wide(x.dtype)),
        weight=jnp.zeros_like(weights, wide(x.dtype)).reshape(-1),
        gate_up=jnp.zeros_like(gate_up),
        down=jnp.zeros_like(down),
    )
    if z is not None:
        rows = _batch_rows(plan, weights, share)
        # The barrier keeps XLA from folding the transposition into the product, which is slower.
        x_t = lax.optimization_barrier(_take(x, rows.source).mT)
        d = pull_rows(x_t, z, _take(d_out, rows.source), rows.weight, gate_up, down)
        slots = _slots(plan, share)
        dx = _sum_slots(d.x, slots, slots.inside.astype(wide(x.dtype)))
        d_weight = jnp.where(slots.inside, _take(d.weight.reshape(-1), slots.index), 0.0)
        sums = d._replace(x=dx, weight=d_weight.reshape(-1))

    def turn(expert: Array, rows: Rows, totals: Totals) -> Totals:
        x_rows = _take(x, rows.source)
        up = gate_up[expert]
        d_rows = _take(d_out, rows.source)
        z = (rounding.rows(x_rows) @ rounding.matrices(up[None], 2)[0]).astype(x.dtype)
        d = pull_rows(x_rows.T, z, d_rows, rows.weight, up, down[expert], sums_in=wide(x.dtype))
        totals = add_to_matrices(totals, expert, d)
        sums = totals.sums
        # Rows that are not the expert's own are out of range, and dropped.
        return totals._replace(
            sums=sums._replace(
                x=sums.x.at[rows.token].add(d.x.astype(wide(x.dtype)), mode="drop"),
                weight=sums.weight.at[rows.assignment].add(d.weight, mode="drop"),
            )
        )

    # No expert has the number -1: the first turn begins with the batch's gradient. Like the arrays
    # that they are made from, these differ from device to device inside shard_map.
    zeros = [jnp.zeros_like(matrix[0], wide(x.dtype)) for matrix in (gate_up, down)]
    totals = Totals(sums, jnp.full_like(plan.counts[0], -1), *zeros)
    sums = _loop(plan, weights, share, turn, totals).sums
    d_weights = sums.weight.reshape(weights.shape).astype(weights.dtype)
    return sums.x.astype(x.dtype), d_weights, sums.gate_up, sums.down, None


_mixture.defvjp(_save, _backward)


def _share(plan: Plan) -> int:
    """batch_share of the rows that a balanced router gives."""
    return batch_share(plan.expected, plan.counts.size, plan.row.shape[0])


def _take(table: Array, index: Array) -> Array:
    """table[index] for indices that are known to be in range, without XLA's clamp."""
    return table.at[index].get(mode="promise_in_bounds")


def _rows(plan: Plan, weights: Array, expert: Array, first: Array | int, size: int) -> Rows:
    """The rows first … first + size - 1 of an expert, or of each expert of an array."""
    within = first + jnp.arange(size)
    at = plan.starts[expert][..., None] + within  # padded rows of the plan, [*expert, size]
    own = within < plan.counts[expert][..., None]
    tokens, per_token = weights.shape
    assignment = jnp.take(plan.assignment, at, mode="clip")
    source = jnp.minimum(assignment // per_token, tokens - 1)
    weight = jnp.take(weights.reshape(-1), assignment, mode="clip")
    return Rows(
        assignment=jnp.where(own, assignment, weights.size),
        token=jnp.where(own, source, tokens),
        source=source,
        weight=jnp.where(own, weight, 0.0),
    )


def _batch_rows(plan: Plan, weights: Array, share: int) -> Rows:
    return _rows(plan, weights, jnp.arange(plan.counts.size), 0, share)


def _slots(plan: Plan, share: int) -> Slots:
    # The place of an assignment among its expert's rows.
    rank = plan.row - jnp.take(plan.starts, plan.experts, mode="clip")
    inside = (plan.row < plan.assignment.size) & (rank < share)
    return Slots(jnp.where(inside, plan.experts * share + rank, 0), inside)


def _sum_slots(rows: Array, slots: Slots, weights: Array) -> Array:
    """sum_k weights[t, k] · rows[slots.index[t, k]] in float32, one k after the other."""
    # XLA:CPU vectorises a chain of gathers along D, and not a sum over a gathered K (0.9 ms against
    # 2.7 ms).
    flat = rows.reshape(-1, rows.shape[-1])
    out = jnp.zeros((len(weights), rows.shape[-1]), wide(rows.dtype))
    for k in range(weights.shape[1]):
        out += weights[:, k, None] * _take(flat, slots.index[:, k]).astype(out.dtype)
    return out


def _loop(
    plan: Plan,
    weights: Array,
    share: int,
    turn: Callable[[Array, Rows, State], State],
    state: State,
) -> State:
    """turn(expert, rows, state) over every expert's rows beyond the share.

    The first loop takes as many whole turns of the large size as there are. The second takes the
    rest in turns of the small size.
    """
    sizes = turn_sizes(share, plan.row.shape[0])
    first = jnp.minimum(plan.counts, share)
    for size in sizes:
        left = plan.counts - first
        # Rounded up in the last loop, whose last turn of an expert may be partly filled.
        number = left // size if size != sizes[-1] else -(-left // size)
        until = jnp.cumsum(number)

        def step(
            carry: tuple[Array, State], size: int = size, first: Array = first, until: Array = until
        ) -> tuple[Array, State]:
            i, state = carry
            expert = jnp.sum(until <= i)  # turns are numbered through all experts
            within = i - jnp.where(expert > 0, until[expert - 1], 0)
            rows = _rows(plan, weights, expert, first[expert] + within * size, size)
            return i + 1, turn(expert, rows, state)

        _, state = lax.while_loop(
            lambda carry, last=until[-1]: carry[0] < last, step, (jnp.int32(0), state)
        )
        first = first + number * size
    return state
