"""Attention that never holds all scores at once (FlashAttention, arXiv:2205.14135, 2307.08691).

Blocks of queries meet blocks of keys one after another. A running maximum and a running sum turn
the blocks' exponentials into the softmax of the whole row. The backward pass computes each block
of scores again from the saved logarithm of the sums. Key blocks that lie wholly in the future of
a query block are skipped, which is half of them.

A scan over query blocks under jax.checkpoint would be simpler. It cannot skip the future, and
measured 1.4x the speed of reference.attend at L = 1024 and 1.1x at 4096. This one measured 2.9x and
2.3x (bench.py).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.model.attention.context import AttentionMask
from moe_jax.parallel.mesh import carry_like

BLOCK = 256
"""Queries and keys of one block. Of 128, 256 and 512, 256 was the fastest at L = 1024 and 2048
(bench.py, two CPU cores)."""
LEAST = -1e30
"""Start of the running maximum. It is finite, because -inf - -inf is NaN: masked scores are -inf,
so that a row that sees nothing has exponentials, sum, output and gradients of exactly 0."""
TINY = 1e-37
"""A positive float32 that guards the division by the sum of a row that sees nothing."""


class Blocks(NamedTuple):
    """The mask in blocks. `rows` are the queries of one block, for each query head that shares a
    key head. `columns` are the keys of one block."""

    positions: Int[Array, "query_blocks rows"]
    query_segments: Int[Array, "query_blocks #B rows"]
    key_segments: Int[Array, "key_blocks #B columns"]

    def visible(self, i: Array, j: Array) -> Bool[Array, "#B 1 rows columns"]:
        """The mask of query block i against key block j, for all heads."""
        segments = self.key_segments[j]
        keys = j * segments.shape[1] + jnp.arange(segments.shape[1])
        same = self.query_segments[i][:, :, None] == segments[:, None, :]
        return (same & (keys <= self.positions[i][:, None]))[:, None]

    def needed(self, i: Array) -> Int[Array, ""]:
        """Number of key blocks up to the last one that query block i sees a part of."""
        return jnp.max(self.positions[i]) // self.key_segments.shape[2] + 1


def attend(
    query: Float[Array, "B L H head_dim"],
    key: Float[Array, "B keys kv_heads head_dim"],
    value: Float[Array, "B keys kv_heads value_dim"],
    mask: AttentionMask,
    block: int = BLOCK,
) -> Float[Array, "B L H value_dim"]:
    """softmax(q kᵀ / sqrt(head_dim), masked) v, as reference.attend.

    The scores take O(B·H·block²) memory.
    Forward-mode derivatives are not defined (jax.custom_vjp).
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    rows = min(block, length)
    columns = min(block, key.shape[1])
    # The rows of one block are the queries of all the heads that share a key head, so that each
    # product is a plain batch of matrices.
    grouped = _cut(query / math.sqrt(width), rows).reshape(-1, batch, rows, kv_heads, group, width)
    grouped = grouped.transpose(0, 1, 3, 4, 2, 5).reshape(-1, batch, kv_heads, group * rows, width)
    # Padding queries stand before the first key: they see nothing. Padding keys stand after the
    # last query: nothing sees them.
    positions = _cut(mask.positions[None], rows, fill=-1)[:, 0]
    blocks = Blocks(
        jnp.tile(positions, (1, group)),
        jnp.tile(_cut(mask.query_segments, rows), (1, 1, group)),
        _cut(mask.key_segments, columns),
    )
    keys, values = (_cut(part, columns).transpose(0, 1, 3, 2, 4) for part in (key, value))
    out = _attend(grouped, keys, values, blocks)
    out = out.reshape(-1, batch, heads, rows, value.shape[-1]).transpose(1, 0, 3, 2, 4)
    return out.reshape(batch, -1, heads, value.shape[-1])[:, :length]


def _cut(x: Array, size: int, fill: int = 0) -> Array:
    """[B, L, ...] -> [blocks, B, size, ...], padded with `fill` to whole blocks."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % size)
    padded = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _scores(query: Array, key: Array, visible: Array) -> Float[Array, "B kv_heads rows columns"]:
    logits = jnp.einsum("bnqa,bnua->bnqu", query, key, preferred_element_type=jnp.float32)
    return jnp.where(visible, logits, -jnp.inf)


def _product(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _attend(
    query: Float[Array, "query_blocks B kv_heads rows head_dim"],
    key: Float[Array, "key_blocks B kv_heads columns head_dim"],
    value: Float[Array, "key_blocks B kv_heads columns value_dim"],
    blocks: Blocks,
) -> Float[Array, "query_blocks B kv_heads rows value_dim"]:
    """attend on blocks; scores, sums and gradients are accumulated in float32."""
    return _forward(query, key, value, blocks)[0]


def _forward(query: Array, key: Array, value: Array, blocks: Blocks) -> tuple[Array, tuple]:
    def query_block(i: Array) -> tuple[Array, Array]:
        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            weighted, peak, total = carry
            scores = _scores(query[i], key[j], blocks.visible(i, j))
            higher = jnp.maximum(peak, scores.max(axis=-1))
            exponentials = jnp.exp(scores - higher[..., None])
            # What was summed so far is relative to the lower maximum.
            shrink = jnp.exp(peak - higher)
            added = _product("bnqu,bnuc->bnqc", exponentials.astype(value.dtype), value[j])
            weighted = weighted * shrink[..., None] + added
            return weighted, higher, total * shrink + exponentials.sum(axis=-1)

        shape = query.shape[1:-1]
        start = (
            jnp.zeros((*shape, value.shape[-1]), jnp.float32),
            jnp.full(shape, LEAST, jnp.float32),
            jnp.zeros(shape, jnp.float32),
        )
        start = carry_like(start, query, key, value)
        weighted, peak, total = lax.fori_loop(0, blocks.needed(i), key_block, start)
        total = jnp.maximum(total, TINY)
        out = (weighted / total[..., None]).astype(value.dtype)
        return out, peak + jnp.log(total)

    out, log_total = lax.map(query_block, jnp.arange(len(query)))
    return out, (query, key, value, blocks, out, log_total)


def _backward(saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, blocks, out, log_total = saved
    # sum over keys of weight · d weight, the same for all keys of a query (2307.08691, §3.1).
    shared = (out.astype(jnp.float32) * d_out).sum(axis=-1)

    def query_block(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_key, d_value = carry
            scores = _scores(query[i], key[j], blocks.visible(i, j))
            weights = jnp.exp(scores - log_total[i][..., None])
            d_weights = _product("bnqc,bnuc->bnqu", d_out[i], value[j])
            d_scores = (weights * (d_weights - shared[i][..., None])).astype(query.dtype)
            d_query += _product("bnqu,bnua->bnqa", d_scores, key[j])
            d_key = d_key.at[j].add(_product("bnqu,bnqa->bnua", d_scores, query[i]))
            weights = weights.astype(value.dtype)
            d_value = d_value.at[j].add(_product("bnqu,bnqc->bnuc", weights, d_out[i]))
            return d_query, d_key, d_value

        start = carry_like((jnp.zeros(query.shape[1:], jnp.float32), *carry), query, key, value)
        d_query, d_key, d_value = lax.fori_loop(0, blocks.needed(i), key_block, start)
        return (d_key, d_value), d_query

    start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    start = carry_like(start, query, key, value)
    (d_key, d_value), d_query = lax.scan(query_block, start, jnp.arange(len(query)))
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)
