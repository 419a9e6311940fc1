"""One transformer block, and a stack of equal blocks that is scanned."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.config import ModelConfig
from moe_jax.model.attention import AttentionContext, Cache, make_attention
from moe_jax.model.dropout import dropout
from moe_jax.model.feed_forward import FeedForward
from moe_jax.model.norm import RMSNorm
from moe_jax.moe.layer import MoE, RouterStats
from moe_jax.moe.rules import NO_CONTEXT, RoutingContext


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    The feed-forward is dense, or a mixture of routed experts plus the shared ones
    (arXiv:2401.06066, §3.2). Matrices that write to the residual stream start smaller by
    sqrt(2 · layers), so that its variance does not grow with depth.
    """

    def __init__(self, model: ModelConfig, *, sparse: bool, rngs: nnx.Rngs) -> None:
        dtype, std = jnp.dtype(model.param_dtype), model.init_std
        out_std = std / (2 * model.layers) ** 0.5
        self.attention_norm = RMSNorm(model.width, model.norm_epsilon, dtype)
        self.attention = make_attention(model, out_std=out_std, rngs=rngs)
        self.feed_forward_norm = RMSNorm(model.width, model.norm_epsilon, dtype)
        hidden = model.dense_hidden
        if sparse:
            hidden = model.moe.shared_experts * model.moe.expert_hidden
            self.moe = MoE(model.width, model.moe, std=std, out_std=out_std, dtype=dtype, rngs=rngs)
        self.sparse = sparse
        self.dropout = model.dropout
        self.dense = hidden > 0
        if self.dense:
            self.feed_forward = FeedForward(
                model.width, hidden, std=std, out_std=out_std, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        x: Float[Array, "B L D"],
        attention: AttentionContext,
        cache: Cache | None = None,
        context: RoutingContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B L D"], tuple[Cache, RouterStats | None]]:
        x, normed, cache = self.enter(x, attention, cache, context)
        routed = stats = None
        if self.sparse:
            routed, stats = self.moe(normed, context)
        return self.leave(x, normed, routed, context), (cache, stats)

    def enter(
        self,
        x: Float[Array, "B L D"],
        attention: AttentionContext,
        cache: Cache | None,
        context: RoutingContext,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], Cache]:
        """The first half: (x + attention(norm(x)), the norm of that, the extended cache)."""
        attended, cache = self.attention(self.attention_norm(x), attention, cache)
        x = x + self._dropped(attended, context, 0)
        return x, self.feed_forward_norm(x), cache

    def leave(
        self,
        x: Float[Array, "B L D"],
        normed: Float[Array, "B L D"],
        routed: Float[Array, "B L D"] | None,
        context: RoutingContext,
    ) -> Float[Array, "B L D"]:
        """The second half: adds what the routed experts made of `normed`, and the dense part."""
        if routed is not None:
            x = x + self._dropped(routed, context, 1)
        if self.dense:
            x = x + self._dropped(self.feed_forward(normed), context, 2)
        return x

    def _dropped(self, added: Array, context: RoutingContext, place: int) -> Array:
        # Both stacks start from the same key: their places differ, so that their masks do.
        place += 3 * self.sparse
        key = None if context.key is None else jax.random.fold_in(context.key, place)
        return dropout(added, self.dropout, key)


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


class Stack(nnx.Module):
    """`count` equal blocks, whose parameters carry a leading layer axis, run by one scan.

    One block is compiled however many there are (`unroll` of them, where that is set). With
    `remat`, its activations are recomputed in the backward pass ("full"), or all of them but the
    products with parameters ("dots").
    """

    def __init__(self, model: ModelConfig, count: int, *, sparse: bool, rngs: nnx.Rngs) -> None:
        self.remat = model.remat
        self.count = count
        self.unroll = min(model.unroll, count)

        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: Array) -> Block:
            return Block(model, sparse=sparse, rngs=nnx.Rngs(params=key))

        self.blocks = make(jax.random.split(rngs.params(), count))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        attention: AttentionContext,
        caches: Cache | None = None,
        context: RoutingContext = NO_CONTEXT,
    ) -> tuple[Float[Array, "B L D"], tuple[Cache | None, RouterStats | None]]:
        """Runs the blocks in order. Caches and statistics carry a leading layer axis; without
        caches given, none are returned."""
        graph, parameters = nnx.split(self.blocks)
        keys = None if context.key is None else jax.random.split(context.key, self.count)

        def step(x: Array, layer: tuple[Any, Cache | None, Array | None]) -> tuple[Array, Any]:
            parameters, cache, key = layer
            block = nnx.merge(graph, parameters)
            x, (extended, stats) = block(x, attention, cache, RoutingContext(context.tokens, key))
            return x, (None if cache is None else extended, stats)

        if self.remat != "none":
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(step, x, (parameters, caches, keys), unroll=self.unroll)
