"""Attention as its formula has it: the specification of the other implementations."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.model.attention.context import AttentionMask


def attend(
    query: Float[Array, "B L H head_dim"],
    key: Float[Array, "B keys kv_heads head_dim"],
    value: Float[Array, "B keys kv_heads value_dim"],
    mask: AttentionMask,
) -> Float[Array, "B L H value_dim"]:
    """softmax(q kᵀ / sqrt(head_dim), masked) v, with the softmax in float32.

    Each key head serves H / kv_heads query heads.
    Memory is O(B·H·L·keys): every score is kept for the backward pass.
    """
    batch, length, heads, width = query.shape
    slots, kv_heads = key.shape[1:3]
    # Heads are moved to the front first, so that each product is a plain batch of matrices.
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    grouped = (grouped / math.sqrt(width)).reshape(batch, kv_heads, -1, width)
    logits = jnp.einsum("bnqa,bmna->bnqm", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, length, slots)
    # A finite number, because the softmax of a row of -inf would be NaN.
    logits = jnp.where(mask.dense()[:, None, None], logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    flat = weights.reshape(batch, kv_heads, -1, slots)
    out = jnp.einsum("bnqm,bmnc->bnqc", flat, value)
    out = out.reshape(batch, kv_heads, -1, length, value.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
