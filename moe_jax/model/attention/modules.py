"""Causal self-attention inside one document: grouped-query (GQA) and multi-head latent (MLA)."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from moe_jax.base.initial import named_key
from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.attention.api import attend
from moe_jax.model.attention.context import AttentionContext
from moe_jax.model.linear import Linear
from moe_jax.model.norm import RMSNorm
from moe_jax.model.rope import Rotation, rotate

Cache = tuple[Array, Array]
"""The KV cache of one layer, [B, keys, …] each: keys and values (GQA), or latents and shared rotary
keys (MLA). See `empty_cache`."""


def _extend(cache: Cache | None, new: Cache, start: Array) -> Cache:
    """The cache with `new` written from slot `start` on. Without a cache, `new` itself."""
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
        std = model.init_std
        dtype = jnp.dtype(model.param_dtype)
        queries = c.heads * c.head_dim
        keys = c.kv_heads * c.head_dim
        linear = partial(Linear, dtype=dtype, gradient=model.gradient_dtype)
        self.query = linear(model.width, queries, std=std, key=named_key(key, "query"))
        self.key = linear(model.width, keys, std=std, key=named_key(key, "key"))
        self.value = linear(model.width, keys, std=std, key=named_key(key, "value"))
        self.out = linear(queries, model.width, std=out_std, key=named_key(key, "out"))
        if c.qk_norm != "none":
            full = c.qk_norm == "full"
            epsilon = model.norm_epsilon
            self.query_norm = RMSNorm(queries if full else c.head_dim, epsilon, dtype)
            self.key_norm = RMSNorm(keys if full else c.head_dim, epsilon, dtype)

    def __call__(
        self, x: Float[Array, "B L D"], context: AttentionContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache]:
        c = self.config
        query = rotate(self._heads(x, self.query, "query"), context.rotation)
        key = rotate(self._heads(x, self.key, "key"), context.rotation)
        value = self.value(x).reshape(*x.shape[:2], c.kv_heads, c.head_dim)
        cache = _extend(cache, (key, value), context.mask.offset)
        key, value = (part.astype(x.dtype) for part in cache)
        out = attend(query, key, value, context.mask, c.implementation)
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def _heads(
        self, x: Float[Array, "B L D"], projection: Linear, name: str
    ) -> Float[Array, "B L heads head_dim"]:
        """The projection cut into heads and normalised as `qk_norm` says."""
        c = self.config
        projected = projection(x)
        if c.qk_norm == "full":
            projected = getattr(self, f"{name}_norm")(projected)
        heads = projected.reshape(*x.shape[:2], -1, c.head_dim)
        return getattr(self, f"{name}_norm")(heads) if c.qk_norm == "head" else heads


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv:2405.04434, eq. 37-47).

    Keys and values are rebuilt from a low-rank latent. All heads share one rotary part of the key.
    The cache holds the normalised latent and the rotated shared key only.
    """

    def __init__(self, model: ModelConfig, *, out_std: float, key: Array) -> None:
        c = self.config = model.attention
        self.softmax_factor = model.yarn.softmax_factor
        width = model.width
        std = model.init_std
        dtype = jnp.dtype(model.param_dtype)
        linear = partial(Linear, dtype=dtype, gradient=model.gradient_dtype)
        queries = c.heads * (c.nope_dim + c.rope_dim)
        if c.q_rank:
            self.query_down = linear(width, c.q_rank, std=std, key=named_key(key, "query_down"))
            self.query_norm = RMSNorm(c.q_rank, model.norm_epsilon, dtype)
        inputs = c.q_rank or width
        self.query_up = linear(inputs, queries, std=std, key=named_key(key, "query_up"))
        latent = c.kv_rank + c.rope_dim
        self.kv_down = linear(width, latent, std=std, key=named_key(key, "kv_down"))
        self.kv_norm = RMSNorm(c.kv_rank, model.norm_epsilon, dtype)
        rebuilt = c.heads * (c.nope_dim + c.v_dim)
        self.kv_up = linear(c.kv_rank, rebuilt, std=std, key=named_key(key, "kv_up"))
        self.out = linear(c.heads * c.v_dim, width, std=out_std, key=named_key(key, "out"))

    def __call__(
        self, x: Float[Array, "B L D"], context: AttentionContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache]:
        c = self.config
        query = self._query(x, context.rotation)
        latent, rope_key = jnp.split(self.kv_down(x), [c.kv_rank], axis=-1)
        # `rotate` wants heads: the shared key is one head of every token.
        rope_key = rotate(rope_key[:, :, None, :], context.rotation)[:, :, 0, :]
        cache = _extend(cache, (self.kv_norm(latent), rope_key), context.mask.offset)
        key, value = self._key_value(*(part.astype(x.dtype) for part in cache))
        out = attend(query, key, value, context.mask, c.implementation)
        return self.out(out.reshape(*x.shape[:2], -1)), cache

    def _query(self, x: Float[Array, "B L D"], angles: Rotation) -> Float[Array, "B L H head_dim"]:
        """Queries whose last rope_dim numbers are rotated; head_dim = nope_dim + rope_dim."""
        c = self.config
        compressed = self.query_norm(self.query_down(x)) if c.q_rank else x
        heads = self.query_up(compressed).reshape(*x.shape[:2], c.heads, -1)
        if self.softmax_factor != 1:
            # On the queries, so that no implementation of attention needs to know of it.
            heads = heads * self.softmax_factor
        nope, rope = jnp.split(heads, [c.nope_dim], axis=-1)
        return jnp.concatenate([nope, rotate(rope, angles)], axis=-1)

    def _key_value(
        self, latent: Float[Array, "B keys kv_rank"], rope_key: Float[Array, "B keys rope_dim"]
    ) -> tuple[Float[Array, "B keys H head_dim"], Float[Array, "B keys H value_dim"]]:
        """Keys and values of all heads from latents and shared rotary keys.

        They are rebuilt for every cached token at each call. The products with kv_up could be
        moved into the queries and the output instead (arXiv:2405.04434, §2.1.2).
        """
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
    """Zeros for `slots` tokens of one layer."""
    if c.kind == "gqa":
        shapes = [(c.kv_heads, c.head_dim)] * 2
    else:
        shapes = [(c.kv_rank,), (c.rope_dim,)]
    first, second = (jnp.zeros((batch, slots, *shape), dtype) for shape in shapes)
    return first, second
