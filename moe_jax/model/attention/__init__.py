"""Attention: context.py (masks, rotary angles) -> modules.py (projections, KV cache) -> api.py
(chooses) -> reference.py (the specification), blockwise.py or cudnn.py."""

from moe_jax.model.attention.api import attend, check_attention
from moe_jax.model.attention.context import (
    AttentionContext,
    AttentionMask,
    cached_context,
    document_context,
    rotary_width,
)
from moe_jax.model.attention.modules import (
    Cache,
    GroupedQueryAttention,
    LatentAttention,
    empty_cache,
    make_attention,
)

__all__ = [
    "AttentionContext",
    "AttentionMask",
    "Cache",
    "GroupedQueryAttention",
    "LatentAttention",
    "attend",
    "cached_context",
    "check_attention",
    "document_context",
    "empty_cache",
    "make_attention",
    "rotary_width",
]
