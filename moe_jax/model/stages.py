"""The model in stages, as pure functions: begin -> (enter -> experts -> leave) a block -> end.

run_block composes the stages of one block, and run_stack scans equal blocks. Training with experts
in tiers and decoding from tiers run the same stages and fetch the experts in between. A stage takes
parameters (a module is no more than its parameters), the residual stream x, and a Context.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.initial import layer_keys, named_key
from moe_jax.config import ModelConfig
from moe_jax.model.attention import (
    AttentionContext,
    Cache,
    cached_context,
    document_context,
)
from moe_jax.model.dropout import dropout
from moe_jax.model.linear import PRODUCT
from moe_jax.moe.layer import Choice, ExpertStack, RouterStats
from moe_jax.moe.rules import RoutingContext
from moe_jax.parallel.mesh import by_rows

if TYPE_CHECKING:
    from moe_jax.model.block import Block, Stack
    from moe_jax.model.norm import RMSNorm
    from moe_jax.model.transformer import Transformer


class Context(NamedTuple):
    """The arguments of a stage besides parameters and the residual stream."""

    tokens: Int[Array, "B L"]
    attention: AttentionContext
    key: Array | None = None
    """The random key of a training step. None outside training: no dropout, no routing noise."""
    documents: Int[Array, "B L"] | None = None
    """The number of each token's document, 0 for none (moe.rules.RoutingContext)."""

    def at(self, *path: str | int | Array) -> "Context":
        """The context of the part of the model called `path`: its key is derived by that name."""
        # By name and not by splitting: a tier that computes layer 7 alone gets the scan's draws.
        return self if self.key is None else self._replace(key=named_key(self.key, *path))


def whole_documents(
    config: ModelConfig, tokens: Int[Array, "B L"], segments: Int[Array, "B L"], key: Array | None
) -> Context:
    """For windows of packed documents: a token attends to its own document up to itself.

    Segment 0 is padding, which no router counts.
    """
    return Context(tokens, document_context(config, segments), key, segments)


def next_tokens(
    config: ModelConfig,
    tokens: Int[Array, "B L"],
    start: Int[Array, ""],
    slots: int,
    segments: Int[Array, "B slots"] | None = None,
) -> Context:
    """For `tokens` from position `start` on, which also attend to the tokens in a KV cache.

    `slots` is the number of positions that the cache has room for. `segments` numbers the documents
    of all slots. None: they are one document.
    """
    return Context(tokens, cached_context(config, start, tokens.shape[1], slots, segments))


def begin(
    model: "Transformer", context: Context, shift: Float[Array, "B L D"] | None = None
) -> Float[Array, "B L D"]:
    """The embedded tokens. `shift` is added to the embeddings (adversarial.perturb)."""
    x = model.embed(context.tokens)
    if shift is not None:
        x = x + shift.astype(x.dtype)
    return by_rows(dropout(x, model.config.dropout, context.at("embedding").key))


class Entered(NamedTuple):
    """A block before its feed-forward."""

    x: Float[Array, "B L D"]
    """The residual stream after attention."""
    normed: Float[Array, "B L D"]
    """The norm of x: the input of the experts, of the router and of the dense feed-forward."""


def enter(
    block: "Block", x: Float[Array, "B L D"], context: Context, cache: Cache | None = None
) -> tuple[Entered, Cache]:
    """x + attention(norm(x)) and its norm, and the KV cache extended by these tokens."""
    attended, cache = block.attention(block.attention_norm(x), context.attention, cache)
    x = x + _dropped(block, attended, context.key, "attention")
    return Entered(x, block.feed_forward_norm(x)), cache


def choose(block: "Block", normed: Float[Array, "B L D"], context: Context) -> Choice:
    """The router's decision for a sparse block, which needs none of its experts."""
    return block.moe.choose(normed, _routing(context))


def leave(
    block: "Block",
    entered: Entered,
    routed: Float[Array, "B L D"] | None,
    key: Array | None = None,
) -> Float[Array, "B L D"]:
    """Adds the output of the routed experts, and that of the shared experts or dense feed-forward.

    `routed` is None in a dense block. `key` is the block's own (Context.key).
    """
    x = entered.x
    if routed is not None:
        x = x + _dropped(block, routed, key, "moe")
    for name in ("shared_experts", "feed_forward"):  # at most one of them
        if hasattr(block, name):
            x = x + _dropped(block, getattr(block, name)(entered.normed), key, name)
    return x


def end(
    model: "Transformer", x: Float[Array, "B L D"], norm: "RMSNorm | None" = None
) -> Float[Array, "B L V"]:
    """norm(x) · headᵀ in the output dtype. Multi-token prediction passes its own norm."""
    normed = (norm or model.norm)(x)
    table = model.output_table().astype(normed.dtype)
    product = jnp.einsum("bld,vd->blv", normed, table, preferred_element_type=jnp.float32)
    return product.astype(model.config.output_dtype)


def run_block(
    block: "Block",
    x: Float[Array, "B L D"],
    context: Context,
    cache: Cache | None = None,
    experts: ExpertStack | None = None,
) -> tuple[Float[Array, "B L D"], Cache, RouterStats | None]:
    """All stages of one block. `context` is the block's own: its key belongs to this layer.

    `experts`: where the block's experts are read, if not in the block (moe.sharded.expert_stack).
    """
    entered, cache = enter(block, x, context, cache)
    routed = stats = None
    if block.sparse:
        routed, stats = block.moe(entered.normed, _routing(context), experts)
    return leave(block, entered, routed, context.key), cache, stats


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
    "full": None,  # jax.checkpoint without a policy saves nothing
}
"""By `model.remat`."""


def run_stack(
    stack: "Stack", x: Float[Array, "B L D"], context: Context, caches: Cache | None = None
) -> tuple[Float[Array, "B L D"], Cache | None, RouterStats | None]:
    """Runs the blocks of a stack in order by one scan, so that one block is compiled for all.

    Caches and statistics carry a leading layer axis. Without caches given, none are returned.
    `remat` "full" recomputes all of a block's activations in the backward pass. "dots" keeps the
    products with parameters and recomputes the rest.
    """
    graph, parameters = nnx.split(stack.blocks)
    own = context.at(stack.name)
    keys = None if own.key is None else layer_keys(own.key, stack.count)
    # Outside of the scan, so that no turn slices a layer's experts out of it.
    whole = stack.blocks.moe.stack(x.dtype) if stack.blocks.sparse else None
    numbers = None if whole is None else jnp.arange(stack.count)

    def step(x: Array, layer: tuple[Any, Cache | None, Array | None, Any]) -> tuple[Array, Any]:
        parameters, cache, key, number = layer
        block = nnx.merge(graph, parameters)
        experts = None if whole is None else whole._replace(layer=number)
        x, extended, stats = run_block(block, x, own._replace(key=key), cache, experts)
        # Attention returns its keys and values in training, too. Stacked by the scan, they would
        # stay in memory for nothing.
        # The carry's layout: without it the partitioner may choose to send activations.
        return by_rows(x), (None if cache is None else extended, stats)

    if stack.remat != "none":
        # The scan keeps XLA from merging the recomputation with the forward pass by itself.
        step = jax.checkpoint(step, policy=REMAT_POLICIES[stack.remat], prevent_cse=False)
    layers = (parameters, caches, keys, numbers)
    x, (caches, stats) = lax.scan(step, x, layers, unroll=stack.unroll)
    return x, caches, stats


def _dropped(block: "Block", added: Array, key: Array | None, place: str) -> Array:
    own = None if key is None else named_key(key, "dropout", place)
    return dropout(added, block.dropout, own)


def _routing(context: Context) -> RoutingContext:
    return RoutingContext(context.tokens, context.at("router").key, context.documents)
