"""The specification in plain jnp: every array by its definition, S x E and R x S at a time."""

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
    """(load, counts, starts, assignment, row, block_expert), as api.schedule defines them."""
    flat = experts.reshape(-1)
    mine = (flat[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    load = mine.sum(axis=0)
    counts = load if capacity is None else jnp.minimum(load, capacity)
    padded = -(-counts // block_rows) * block_rows
    starts = jnp.cumsum(padded) - padded
    rank = jnp.sum((jnp.cumsum(mine, axis=0) - mine) * mine, axis=1)
    owner = jnp.minimum(flat, num_experts - 1)
    kept = (flat < num_experts) & (rank < counts[owner])
    row = jnp.where(kept, starts[owner] + rank, blocks * block_rows)
    holds = jnp.arange(blocks * block_rows)[:, None] == row
    held = jnp.where(holds, jnp.arange(flat.size), flat.size)
    assignment = jnp.min(held, axis=1, initial=flat.size)
    ended = starts + padded <= jnp.arange(blocks)[:, None] * block_rows
    block_expert = jnp.minimum(ended.sum(axis=1), num_experts - 1)
    found = (load, counts, starts, assignment, row.reshape(experts.shape), block_expert)
    return tuple(array.astype(jnp.int32) for array in found)
