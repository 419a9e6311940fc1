"""The language model: embedding -> dense blocks -> mixture-of-experts blocks -> norm -> head."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model.attention import AttentionContext, Cache, document_context, empty_cache
from moe_jax.model.block import Stack
from moe_jax.model.dropout import dropout
from moe_jax.model.linear import normal_param
from moe_jax.model.mtp import MultiTokenPrediction
from moe_jax.model.norm import RMSNorm
from moe_jax.moe.layer import RouterStats
from moe_jax.moe.rules import RoutingContext


class Caches(NamedTuple):
    """Attention memory of both stacks, with a leading layer axis; None for an absent stack."""

    dense: Cache | None
    sparse: Cache | None


class Transformer(nnx.Module):
    """Decoder-only transformer over packed documents.

    `hidden` gives the residual stream after the last block and `logits` reads it out; multi-token
    prediction starts from the same stream, so they are separate calls.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        assert config.vocabulary is not None, "use TrainConfig.resolved_model()"
        self.config = config
        dtype, shape = jnp.dtype(config.param_dtype), (config.vocabulary, config.width)
        self.embedding = normal_param(rngs.params(), shape, config.init_std, dtype)
        if not config.tied_embedding:
            self.head = normal_param(rngs.params(), shape, config.init_std, dtype)
        if config.dense_layers:
            self.dense = Stack(config, config.dense_layers, sparse=False, rngs=rngs)
        if config.moe_layers:
            self.sparse = Stack(config, config.moe_layers, sparse=True, rngs=rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        if config.mtp_depth:
            self.mtp = MultiTokenPrediction(config, rngs=rngs)

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Rows of the embedding in the compute dtype."""
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        return rows.astype(self.config.compute_dtype)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        attention: AttentionContext,
        caches: Caches | None = None,
        key: Array | None = None,
        shift: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Caches, RouterStats | None]:
        """The residual stream before the final norm, the caches extended by these tokens, and the
        statistics of the mixture-of-experts blocks (None in a dense model). A `key` marks a
        training step (moe.rules.RoutingContext, dropout). `shift` is added to the embeddings
        (adversarial.perturb)."""
        context = RoutingContext(tokens, key)
        dense, sparse = caches or Caches(None, None)
        x, dense = self.begin(tokens, attention, dense, context, shift)
        stats = None
        if self.config.moe_layers:
            x, (sparse, stats) = self.sparse(x, attention, sparse, context)
        return x, Caches(dense, sparse), stats

    def begin(
        self,
        tokens: Int[Array, "B L"],
        attention: AttentionContext,
        cache: Cache | None,
        context: RoutingContext,
        shift: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """The residual stream before the first mixture-of-experts block, and the dense blocks'
        cache; as `hidden`."""
        x = self.embed(tokens)
        if shift is not None:
            x = x + shift.astype(x.dtype)
        x = dropout(x, self.config.dropout, context.key)
        if self.config.dense_layers:
            x, (cache, _) = self.dense(x, attention, cache, context)
        return x, cache

    def logits(
        self, hidden: Float[Array, "B L D"], norm: RMSNorm | None = None
    ) -> Float[Array, "B L V"]:
        """norm(hidden) · headᵀ in the output dtype; multi-token prediction brings its own norm."""
        normed = (norm or self.norm)(hidden)
        table = self.embedding if self.config.tied_embedding else self.head
        table = table[...].astype(normed.dtype)
        product = jnp.einsum("bld,vd->blv", normed, table, preferred_element_type=jnp.float32)
        return product.astype(self.config.output_dtype)

    def __call__(
        self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"]
    ) -> Float[Array, "B L V"]:
        """Logits of the next token at every position."""
        hidden, _, _ = self.hidden(tokens, document_context(self.config, segments))
        return self.logits(hidden)

    def empty_caches(self, batch: int, slots: int) -> Caches:
        """Room for `slots` tokens in every layer, in the compute dtype."""

        def stacked(layers: int) -> Cache | None:
            one = empty_cache(
                self.config.attention, batch, slots, jnp.dtype(self.config.compute_dtype)
            )
            first, second = (jnp.broadcast_to(part, (layers, *part.shape)) for part in one)
            return (first, second) if layers else None

        return Caches(stacked(self.config.dense_layers), stacked(self.config.moe_layers))
