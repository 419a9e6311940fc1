"""The specification in plain jnp: every array by its definition, with S x E and R x S arrays."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


def schedule(
    experts: Int[Array, "T K"],
    num_experts: int,
    block_rows: int,
    blocks: int,
    capacity: int | None = None,
) -> tuple[Array, ...]:
    """Returns (load, counts, starts, assignment, row, block_expert), as api.Schedule defines them.

    It is for small sizes: its memory is quadratic in the number of assignments.
    """
    flat = experts.reshape(-1)  # [S]
    # An expert beyond the last matches no column, so an assignment without an expert has no load.
    one_hot = (flat[:, None] == jnp.arange(num_experts)).astype(jnp.int32)  # [S, E]
    load = one_hot.sum(axis=0)
    counts = load if capacity is None else jnp.minimum(load, capacity)
    padded = -(-counts // block_rows) * block_rows
    starts = jnp.cumsum(padded) - padded
    rank = jnp.sum((jnp.cumsum(one_hot, axis=0) - one_hot) * one_hot, axis=1)  # within its expert
    owner = jnp.minimum(flat, num_experts - 1)
    kept = (flat < num_experts) & (rank < counts[owner])
    row = jnp.where(kept, starts[owner] + rank, blocks * block_rows)
    is_row = jnp.arange(blocks * block_rows)[:, None] == row  # [R, S], at most one True a row
    candidates = jnp.where(is_row, jnp.arange(flat.size), flat.size)
    assignment = jnp.min(candidates, axis=1, initial=flat.size)
    # The expert of a block is the number of experts whose blocks have all ended before it.
    ended = starts + padded <= jnp.arange(blocks)[:, None] * block_rows
    block_expert = jnp.minimum(ended.sum(axis=1), num_experts - 1)
    arrays = (load, counts, starts, assignment, row.reshape(experts.shape), block_expert)
    return tuple(array.astype(jnp.int32) for array in arrays)
