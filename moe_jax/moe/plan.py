"""Step 2: where every (token, expert) assignment goes, as integers only.

Assignments are sorted by expert and each expert's rows are padded to whole blocks, so that a block
belongs to one expert. All shapes are static, nothing is dropped, and there is no scatter: XLA runs
scatters one by one on the CPU, while sorts and gathers are fast everywhere.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class Plan(NamedTuple):
    """One layer's dispatch, shared by dispatch, experts and combine.

    S = T·K assignments, numbered t·K + k; R = blocks · block_rows padded rows.
    """

    counts: Int[Array, "E"]
    """Assignments per expert; they sum to S."""
    assignment: Int[Array, "R"]
    """The assignment in a padded row, or S where the row is padding."""
    row: Int[Array, "T K"]
    """The padded row that holds an assignment: assignment[row[t, k]] = t·K + k."""
    block_expert: Int[Array, "blocks"]
    """The expert of each block (that of an unused block is arbitrary: all its rows are padding)."""


def block_rows(assignments: int, experts: int) -> int:
    """Rows in a block: the mean load rounded up to a power of two, between 8 and 128."""
    mean_load = -(-assignments // experts)
    return min(128, max(8, 1 << (mean_load - 1).bit_length()))


def block_count(assignments: int, experts: int, rows: int) -> int:
    """Blocks that suffice for every routing: floor(S / rows) + min(E, S)."""
    return assignments // rows + min(experts, assignments)


def make_plan(experts: Int[Array, "T K"], num_experts: int) -> Plan:
    """Sorts the assignments by expert, earlier tokens first, and lays out the blocks."""
    tokens, per_token = experts.shape
    assignments = tokens * per_token
    rows = block_rows(assignments, num_experts)
    blocks = block_count(assignments, num_experts, rows)

    flat = experts.reshape(assignments)
    order = jnp.argsort(flat, stable=True)
    ends = jnp.searchsorted(flat[order], jnp.arange(num_experts), side="right")
    counts = jnp.diff(ends, prepend=0)
    starts = ends - counts
    padded_ends = jnp.cumsum(-(-counts // rows) * rows)
    padded_starts = padded_ends - -(-counts // rows) * rows

    rank = jnp.argsort(order)
    row = padded_starts[flat] + rank - starts[flat]

    first_rows = jnp.arange(blocks) * rows
    block_expert = jnp.searchsorted(padded_ends, first_rows, side="right")
    block_expert = jnp.minimum(block_expert, num_experts - 1)
    of_row = jnp.repeat(block_expert, rows)
    within = jnp.arange(blocks * rows) - padded_starts[of_row]
    filled = within < counts[of_row]
    sorted_row = jnp.minimum(starts[of_row] + within, assignments - 1)
    assignment = jnp.where(filled, order[sorted_row], assignments)
    return Plan(counts, assignment, row.reshape(tokens, per_token), block_expert)
