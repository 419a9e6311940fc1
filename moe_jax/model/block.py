"""One transformer block, and a stack of equal blocks: their parameters."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.base.initial import layer_keys, named_key
from moe_jax.config import ModelConfig
from moe_jax.model.attention import make_attention
from moe_jax.model.feed_forward import FeedForward
from moe_jax.model.norm import RMSNorm
from moe_jax.moe.module import MoE


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): see stages.run_block.

    The feed-forward is dense, or a mixture of routed experts plus the shared ones
    (arXiv:2401.06066, §3.2). Matrices that write to the residual stream start smaller by
    sqrt(2 · layers), so that its variance does not grow with depth.
    """

    def __init__(self, model: ModelConfig, *, sparse: bool, key: Array) -> None:
        dtype = jnp.dtype(model.param_dtype)
        std = model.init_std
        # Two additions to the residual stream a layer, attention's and the feed-forward's.
        out_std = std / (2 * model.layers) ** 0.5
        self.sparse = sparse
        self.dropout = model.dropout
        self.attention_norm = RMSNorm(model.width, model.norm_epsilon, dtype)
        self.attention = make_attention(model, out_std=out_std, key=named_key(key, "attention"))
        self.feed_forward_norm = RMSNorm(model.width, model.norm_epsilon, dtype)

        def feed_forward(name: str, hidden: int) -> FeedForward:
            own = named_key(key, name)
            return FeedForward(
                model.width,
                hidden,
                std=std,
                out_std=out_std,
                dtype=dtype,
                gradient=model.gradient_dtype,
                key=own,
            )

        if not sparse:
            self.feed_forward = feed_forward("feed_forward", model.dense_hidden)
            return
        moe_key = named_key(key, "moe")
        self.moe = MoE(
            model.width,
            model.moe,
            std=std,
            out_std=out_std,
            dtype=dtype,
            gradient=model.gradient_dtype,
            key=moe_key,
        )
        if model.moe.shared_experts:
            # Every token passes all N shared experts: they are one feed-forward N times as wide.
            hidden = model.moe.shared_experts * model.moe.expert_hidden
            self.shared_experts = feed_forward("shared_experts", hidden)


class Stack(nnx.Module):
    """`count` equal blocks, whose parameters carry a leading layer axis: see stages.run_stack."""

    def __init__(self, model: ModelConfig, count: int, *, sparse: bool, key: Array) -> None:
        self.name = "sparse" if sparse else "dense"
        self.remat = model.remat
        self.count = count
        self.unroll = min(model.unroll, count)

        # One key a layer, derived by its index: vmap draws what single blocks would draw.
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: Array) -> Block:
            return Block(model, sparse=sparse, key=key)

        self.blocks = make(layer_keys(key, count))
