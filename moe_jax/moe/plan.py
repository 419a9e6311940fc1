"""Step 2: where every (token, expert) assignment goes, as integers only.

Assignments are sorted by expert, and each expert's rows are padded to whole blocks, so that a block
belongs to one expert. All shapes are static. There is no scatter, because XLA:CPU runs a scatter
one element at a time, while sorts and gathers are fast everywhere.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int
from moe_kernels.schedule import block_count, choose_block_rows, schedule

from moe_jax.parallel.mesh import shared_by, sum_over_earlier


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """One layer's dispatch, shared by every implementation of the experts.

    There are S = T·K assignments, numbered t·K + k, and R = blocks · block_rows padded rows.
    """

    load: Int[Array, "E"]
    """Assignments that the gate made to each expert."""
    counts: Int[Array, "E"]
    """Rows that each expert computes: its load, or the expert capacity where that is less."""
    starts: Int[Array, "E"]
    """First row of each expert. Its other rows follow without a gap."""
    assignment: Int[Array, "R"]
    """The assignment in a padded row, or S where the row is padding."""
    row: Int[Array, "T K"]
    """The inverse: assignment[row[t, k]] = t·K + k. R where the assignment was dropped."""
    experts: Int[Array, "T K"]
    """The expert of each assignment, or E where it has no row."""
    block_expert: Int[Array, "blocks"]
    """The expert of each block. Any expert for an unused block, whose rows are all padding."""
    block_rows: int = dataclasses.field(metadata={"static": True})
    """Rows of a block."""
    most: int = dataclasses.field(metadata={"static": True})
    """The experts compute at most so many rows together: S, or E times the expert capacity."""
    expected: int = dataclasses.field(metadata={"static": True})
    """Rows that they compute together if the router is balanced. It decides sizes, not results."""


def sort_with_index(keys: Int[Array, "S"], below: int) -> tuple[Int[Array, "S"], Int[Array, "S"]]:
    """(sorted keys, their former indices), stable, for 0 <= keys < `below`.

    Key and index share one 32-bit word where they fit. XLA:CPU sorts one plain array several times
    faster than a pair (measured at S = 12288: 0.3 ms against 1.9 ms).
    """
    size = keys.size
    index = jnp.arange(size, dtype=jnp.int32)
    bits = (size - 1).bit_length()
    if (below - 1).bit_length() + bits > 32:
        first, second = lax.sort((keys, index), num_keys=1, is_stable=True)
        return first, second
    word = jnp.sort((keys.astype(jnp.uint32) << bits) | index.astype(jnp.uint32))
    mask = jnp.uint32((1 << bits) - 1)
    return (word >> bits).astype(keys.dtype), (word & mask).astype(jnp.int32)


def make_plan(
    experts: Int[Array, "T K"],
    num_experts: int,
    capacity: int | None = None,
    kernels: bool = False,
    expected: int | None = None,
) -> Plan:
    """Sorts the assignments by expert, earlier tokens first, and lays out the blocks.

    An assignment to expert `num_experts` is to no expert and has no row. With a `capacity`, an
    expert keeps its first so many assignments, and its others have no row either. Without one,
    nothing is dropped. Inside a shard_map the tokens of earlier devices take their share of the
    capacity first. With `kernels`, Triton kernels compute the same arrays. `expected` is
    Plan.expected, for callers many of whose assignments are to no expert.
    """
    assignments = experts.size
    most = assignments if capacity is None else min(assignments, num_experts * capacity)
    expected = most if expected is None else min(most, expected)
    rows = choose_block_rows(expected, num_experts)
    # The kernels know no capacity that differs between experts.
    if kernels and (capacity is None or shared_by() == 1):
        blocks = block_count(most, num_experts, rows)
        scheduled = schedule(experts, num_experts, rows, blocks, capacity)
        return Plan(**vars(scheduled), most=most, expected=expected)
    plan = _plan_in_xla(experts, num_experts, capacity, rows, most)
    return dataclasses.replace(plan, expected=expected)


def plan_by_kernels(experts: Int[Array, "T K"], num_experts: int) -> Plan:
    """make_plan by the kernels, under a name for benchmarks of layers that share it."""
    return make_plan(experts, num_experts, kernels=True)


def _plan_in_xla(
    experts: Int[Array, "T K"], num_experts: int, capacity: int | None, rows: int, most: int
) -> Plan:
    """make_plan without Triton: blocks of `rows` rows for at most `most` assignments."""
    tokens, per_token = experts.shape
    assignments = tokens * per_token
    blocks = block_count(most, num_experts, rows)
    # Loads from the positions where each expert's run ends. Number E (no expert) sorts last and is
    # never counted.
    flat = experts.reshape(assignments)
    in_order, order = sort_with_index(flat, num_experts + 1)
    ends = jnp.searchsorted(in_order, jnp.arange(num_experts), side="right").astype(jnp.int32)
    load = jnp.diff(ends, prepend=0)
    counts = load
    if capacity is not None:
        # The tokens of earlier devices come first.
        counts = jnp.clip(capacity - sum_over_earlier(load), 0, load)
    sorted_starts = ends - load  # first place of each expert in the sorted order, drops included
    # Whole blocks for each expert. The matrix products of the kernels then need no masks.
    padded = -(-counts // rows) * rows
    padded_ends = jnp.cumsum(padded)
    starts = padded_ends - padded

    # Sorting a permutation with its index inverts it: rank[a] is the place of assignment a.
    _, rank = sort_with_index(order, assignments)
    owner = jnp.minimum(flat, num_experts - 1)
    within = rank - sorted_starts[owner]
    # The sort is stable, so an expert over its capacity keeps its earliest tokens.
    kept = (flat < num_experts) & (within < counts[owner])
    row = jnp.where(kept, starts[owner] + within, blocks * rows)

    # And backwards, from a padded row to its assignment. Unused blocks lie past all ends, and are
    # clipped to the last expert, whose count masks their rows.
    block_expert = jnp.searchsorted(padded_ends, jnp.arange(blocks) * rows, side="right")
    block_expert = jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32)
    of_row = jnp.repeat(block_expert, rows)
    within = jnp.arange(blocks * rows) - starts[of_row]
    sorted_row = jnp.minimum(sorted_starts[of_row] + within, assignments - 1)
    assignment = jnp.where(within < counts[of_row], order[sorted_row], assignments)
    row = row.reshape(tokens, per_token)
    if capacity is not None:
        experts = jnp.where(row < blocks * rows, experts, num_experts)
    return Plan(
        load=load,
        counts=counts,
        starts=starts,
        assignment=assignment,
        row=row,
        experts=experts,
        block_expert=block_expert,
        block_rows=rows,
        most=most,
        expected=most,
    )
