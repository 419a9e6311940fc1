"""The bounded buffer in which copies of tokens are sent: which copy lies in which slot.

A token has up to J copies, numbered t·J + j, each for one of G destinations. Every destination has
C slots of the buffer. Copies beyond them wait for a later round.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from moe_jax.moe.plan import Plan
from moe_jax.moe.precision import wide


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """One round of the buffer. A destination's slots lie together."""

    copy: Int[Array, "N"]
    """The copy t·J + j in a slot, or T·J where the slot is empty. N = G·C."""
    slot: Int[Array, "T copies"]
    """The inverse: copy[slot[t, j]] = t·J + j. N where the copy is not in this round."""

    def of_copies(self) -> "Slots":
        """The same slots for an array with a row a copy in place of a row a token."""
        return Slots(self.copy, self.slot.reshape(-1, 1))


def slots_of(plan: Plan, size: int, round: Int[Array, ""] | int) -> Slots:
    """The slots of a round: of each destination the copies round · C … round · C + C - 1.

    `plan` is make_plan of the copies' destinations, and `size` is C.
    """
    destinations = plan.counts.size
    within = jnp.arange(size) + round * size  # among a destination's copies
    at = jnp.minimum(plan.starts[:, None] + within, plan.assignment.size - 1)
    filled = within < plan.counts[:, None]
    copy = jnp.where(filled, plan.assignment[at], plan.row.size)
    start = jnp.take(plan.starts, plan.experts, mode="clip")
    place = plan.row - start - round * size
    inside = (plan.experts < destinations) & (place >= 0) & (place < size)
    slot = jnp.where(inside, plan.experts * size + place, destinations * size)
    return Slots(copy.reshape(-1), slot)


def fill(x: Float[Array, "T D"], slots: Slots, parts: int) -> tuple[Float[Array, "N D"], ...]:
    """x[token of a slot], 0 in empty slots, in `parts` arrays of equally many destinations.

    The transpose of `collect`. Both gather, because a scatter is slow on XLA:CPU.
    """
    return _fill(x, slots, parts)


def collect(parts: tuple[Float[Array, "N D"], ...], slots: Slots) -> Float[Array, "T D"]:
    """out[t] = sum_j rows[slot[t, j]] over the rows of all parts. The transpose of `fill`."""
    return _collect(parts, slots, len(parts))


def _take(x: Array, slots: Slots, parts: int) -> tuple[Array, ...]:
    per_token = slots.slot.shape[1]
    rows = []
    for copy in jnp.split(slots.copy, parts):
        taken = jnp.take(x, copy // per_token, axis=0, mode="clip")
        rows.append(jnp.where((copy < slots.slot.size)[:, None], taken, 0))
    return tuple(rows)


def _sum(parts: tuple[Array, ...], slots: Slots) -> Array:
    rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    out = jnp.zeros((len(slots.slot), rows.shape[1]), wide(rows.dtype))
    # One copy after the other: XLA:CPU vectorises this along D, and not a sum over [T, J, D].
    for slot in slots.slot.T:
        out += jnp.take(rows, slot, axis=0, mode="fill", fill_value=0).astype(out.dtype)
    return out.astype(rows.dtype)


def _sum_parts(parts: tuple[Array, ...], slots: Slots, number: int) -> Array:
    return _sum(parts, slots)


_fill = jax.custom_vjp(_take, nondiff_argnums=(2,))
_fill.defvjp(
    lambda x, slots, parts: (_take(x, slots, parts), slots),
    lambda parts, slots, d_rows: (_sum(d_rows, slots), None),
)
_collect = jax.custom_vjp(_sum_parts, nondiff_argnums=(2,))
_collect.defvjp(
    lambda parts, slots, number: (_sum(parts, slots), slots),
    lambda number, slots, d_out: (_take(d_out, slots, number), None),
)
