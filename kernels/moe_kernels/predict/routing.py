"""A routing in NumPy, from which the prediction reads which row each tile reads."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_kernels.bench.shapes import Shape
from moe_kernels.schedule.api import block_count, choose_block_rows


class Routing(NamedTuple):
    """Rows in blocks of one expert each, as schedule.Schedule has them."""

    counts: Int[np.ndarray, "E"]
    """Rows of each expert."""
    token: Int[np.ndarray, "blocks rows"]
    """The token of each row, -1 for padding: what a gathered product reads."""
    row: Int[np.ndarray, "blocks rows"]
    """The row itself, -1 for padding: what every other product reads."""
    block_rows: int


def balanced_routing(shape: Shape, seed: int) -> Routing:
    """Independent tokens whose gate prefers no expert."""
    random = np.random.default_rng(seed)
    scores = random.random((shape.tokens, shape.experts), np.float32)
    chosen = np.argpartition(scores, shape.per_token, axis=1)[:, : shape.per_token]
    return routing_of(chosen, shape.experts)


def routing_of(chosen: Int[np.ndarray, "T K"], experts: int) -> Routing:
    """The routing of tokens to their chosen experts."""
    block_rows = choose_block_rows(chosen.size, experts)
    blocks = block_count(chosen.size, experts, block_rows)
    flat = chosen.reshape(-1)
    counts = np.bincount(flat, minlength=experts)
    padded = -(-counts // block_rows) * block_rows
    starts = np.cumsum(padded) - padded
    order = np.argsort(flat, kind="stable")
    # The place of each sorted assignment among its expert's rows.
    rank = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = starts[flat[order]] + rank
    token = np.full(blocks * block_rows, -1)
    token[rows] = order // chosen.shape[1]
    row = np.where(token >= 0, np.arange(token.size), -1)
    by_block = (blocks, block_rows)
    return Routing(counts, token.reshape(by_block), row.reshape(by_block), block_rows)
