"""Causal self-attention inside one document: grouped-query (GQA) and multi-head latent (MLA)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.base.initial import named_key
from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.linear import Linear
from moe_jax.model.norm import RMSNorm
from moe_jax.model.rope import Rotation, rotate, rotation


class AttentionContext(NamedTuple):
    """What attention needs to know about the tokens; the same for every block."""

    start: Int[Array, ""]
    """Position of the first query, and its slot in a cache."""
    rotation: Rotation
    """Rotary angles of the queries."""
    mask: Bool[Array, "B L M"]
    """Whether query l may see key m."""


def rotary_width(c: AttentionConfig) -> int:
    """Width of the part of a head that is rotated."""
    return c.head_dim if c.kind == "gqa" else c.rope_dim


def document_context(model: ModelConfig, segments: Int[Array, "B L"]) -> AttentionContext:
    """Each token sees itself and the earlier tokens of its own document (segment number).

    Positions count through the whole window: rotary attention depends on distances only.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    positions = jnp.arange(length)[None]
    turn = rotation(positions, rotary_width(model.attention), model.rope_base)
    return AttentionContext(jnp.zeros((), jnp.int32), turn, same & causal)


def cached_context(
    model: ModelConfig, start: Int[Array, ""], length: int, slots: int
) -> AttentionContext:
    """`length` new tokens from position `start` on see every earlier slot of a cache."""
    positions = start + jnp.arange(length)
    turn = rotation(positions[None], rotary_width(model.attention), model.rope_base)
    return AttentionContext(start, turn, (jnp.arange(slots) <= positions[:, None])[None])


def attend(
    query: Float[Array, "B L H A"],
    key: Float[Array, "B M N A"],
    value: Float[Array, "B M N C"],
    mask: Bool[Array, "#B L M"],
) -> Float[Array, "B L H C"]:
    """softmax(q kᵀ / sqrt(A), masked) v, softmax in float32; each key head serves H / N queries.

    Heads are moved to the front first, so that each product is a plain batch of matrices.
    """
    batch, length, heads, width = query.shape
    slots, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    grouped = (grouped / math.sqrt(width)).reshape(batch, kv_heads, -1, width)
    logits = jnp.einsum("bnqa,bmna->bnqm", grouped, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, length, slots)
    logits = jnp.where(mask[:, None, None], logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    flat = weights.reshape(batch, kv_heads, -1, slots)
    out = jnp.einsum("bnqm,bmnc->bnqc", flat, value)
    out = out.reshape(batch, kv_heads, -1, length, value.shape[-1])
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)


Cache = tuple[Array, Array]
"""One layer's memory of earlier tokens, [B, M, …] each; see the modules' `empty_cache`."""


def _extend(cache: Cache | None, new: Cache, start: Array) -> Cache:
    """The cache with `new` written from slot `start` on; `new` itself where there is no cache."""
    if cache is None:
        return new
    return tuple(  # pyright: ignore[reportReturnType]
        lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), start, axis=1)
        for old, fresh in zip(cache, new, strict=True)
    )


class GroupedQueryAttention(nnx.Module):
    """Multi-head attention whose key/value heads are shared by groups of queries (2305.13245)."""

    def __init__(self, model: ModelConfig, *, out_std: float, key: Array) -> None:
        c = self.config = model.attention
        std, dtype = model.init_std, jnp.dtype(model.param_dtype)
        queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.query = Linear(model.width, queries, std=std, dtype=dtype, key=named_key(key, "query"))
        self.key = Linear(model.width, keys, std=std, dtype=dtype, key=named_key(key, "key"))
        self.value = Linear(model.width, keys, std=std, dtype=dtype, key=named_key(key, "value"))
        self.out = Linear(queries, model.width, std=out_std, dtype=dtype, key=named_key(key, "out"))
        if c.qk_norm != "none":
            full = c.qk_norm == "full"
            epsilon = model.norm_epsilon
            self.query_norm = RMSNorm(queries if full else c.head_dim, epsilon, dtype)
            self.key_norm = RMSNorm(keys if full else c.head_dim, epsilon, dtype)

    def __call__(
        self, x: Float[Array, "B L D"], attention: AttentionContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache]:
        c = self.config
        query, key = self._heads(x, self.query, "query"), self._heads(x, self.key, "key")
        value = self.value(x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
        query, key = rotate(query, attention.rotation), rotate(key, attention.rotation)
        cache = _extend(cache, (key, value), attention.start)
        key, value = (part.astype(x.dtype) for part in cache)
        out = attend(query, key, value, attention.mask)
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Array, projection: Linear, name: str) -> Array:
        c = self.config
        projected = projection(x)
        if c.qk_norm == "full":
            projected = getattr(self, f"{name}_norm")(projected)
        heads = projected.reshape(*x.shape[:2], -1, c.head_dim)
        return getattr(self, f"{name}_norm")(heads) if c.qk_norm == "head" else heads


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv:2405.04434, eq. 37-47).

    Keys and values are rebuilt from a low-rank latent; a separate rotary part of the key is shared
    by all heads. The cache holds the normalised latent and the rotated shared key only.
    """

    def __init__(self, model: ModelConfig, *, out_std: float, key: Array) -> None:
        c = self.config = model.attention
        width, std, dtype = model.width, model.init_std, jnp.dtype(model.param_dtype)
        queries = c.heads * (c.nope_dim + c.rope_dim)
        if c.q_rank:
            self.query_down = Linear(
                width, c.q_rank, std=std, dtype=dtype, key=named_key(key, "query_down")
            )
            self.query_norm = RMSNorm(c.q_rank, model.norm_epsilon, dtype)
        self.query_up = Linear(
            c.q_rank or width, queries, std=std, dtype=dtype, key=named_key(key, "query_up")
        )
        self.kv_down = Linear(
            width, c.kv_rank + c.rope_dim, std=std, dtype=dtype, key=named_key(key, "kv_down")
        )
        self.kv_norm = RMSNorm(c.kv_rank, model.norm_epsilon, dtype)
        rebuilt = c.heads * (c.nope_dim + c.v_dim)
        self.kv_up = Linear(c.kv_rank, rebuilt, std=std, dtype=dtype, key=named_key(key, "kv_up"))
        self.out = Linear(
            c.heads * c.v_dim, width, std=out_std, dtype=dtype, key=named_key(key, "out")
        )

    def __call__(
        self, x: Float[Array, "B L D"], attention: AttentionContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache]:
        c = self.config
        query = self._query(x, attention.rotation)
        latent, rope_key = jnp.split(self.kv_down(x), [c.kv_rank], axis=-1)
        rope_key = rotate(rope_key[:, :, None, :], attention.rotation)[:, :, 0, :]
        cache = _extend(cache, (self.kv_norm(latent), rope_key), attention.start)
        key, value = self._key_value(*(part.astype(x.dtype) for part in cache))
        out = attend(query, key, value, attention.mask)
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def _query(self, x: Array, turn: Rotation) -> Array:
        c = self.config
        compressed = self.query_norm(self.query_down(x)) if c.q_rank else x
        heads = self.query_up(compressed).reshape(*x.shape[:2], c.heads, -1)
        nope, rope = jnp.split(heads, [c.nope_dim], axis=-1)
        return jnp.concatenate([nope, rotate(rope, turn)], axis=-1)

    def _key_value(self, latent: Array, rope_key: Array) -> tuple[Array, Array]:
        c = self.config
        heads = self.kv_up(latent).reshape(*latent.shape[:2], c.heads, -1)
        nope, value = jnp.split(heads, [c.nope_dim], axis=-1)
        shared = jnp.broadcast_to(rope_key[:, :, None, :], (*nope.shape[:3], c.rope_dim))
        return jnp.concatenate([nope, shared], axis=-1), value


def make_attention(
    model: ModelConfig, *, out_std: float, key: Array
) -> GroupedQueryAttention | LatentAttention:
    """The attention that `model.attention.kind` names."""
    kinds = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
    return kinds[model.attention.kind](model, out_std=out_std, key=key)


def empty_cache(c: AttentionConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """Zeros for `slots` tokens of one layer: keys and values, or latents and shared keys."""
    if c.kind == "gqa":
        shapes = [(c.kv_heads, c.head_dim)] * 2
    else:
        shapes = [(c.kv_rank,), (c.rope_dim,)]
    first, second = (jnp.zeros((batch, slots, *shape), dtype) for shape in shapes)
    return first, second
