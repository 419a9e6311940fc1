"""The language model: embedding -> dense blocks -> mixture-of-experts blocks -> norm -> head."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.base.initial import named_key, normal_parameter
from moe_jax.config import ModelConfig
from moe_jax.model import stages
from moe_jax.model.attention import Cache, empty_cache
from moe_jax.model.block import Stack
from moe_jax.model.dtype import compute_dtype
from moe_jax.model.mtp import MultiTokenPrediction
from moe_jax.model.norm import RMSNorm
from moe_jax.moe.layer import RouterStats


class Caches(NamedTuple):
    """KV caches of both stacks, with a leading layer axis. None for an absent stack."""

    dense: Cache | None
    sparse: Cache | None


class Transformer(nnx.Module):
    """Decoder-only transformer over packed documents.

    `hidden` gives the residual stream after the last block and `logits` reads it out. They are
    separate calls because multi-token prediction starts from the same stream.
    """

    def __init__(self, config: ModelConfig, *, key: Array) -> None:
        assert config.vocabulary is not None, "use TrainConfig.resolved()"
        self.config = config
        dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocabulary, config.width)

        def table(name: str) -> nnx.Param:
            return normal_parameter(named_key(key, name), shape, config.init_std, dtype)

        self.embedding = table("embedding")
        if not config.tied_embedding:
            self.head = table("head")
        if config.dense_layers:
            own = named_key(key, "dense")
            self.dense = Stack(config, config.dense_layers, sparse=False, key=own)
        if config.moe_layers:
            own = named_key(key, "sparse")
            self.sparse = Stack(config, config.moe_layers, sparse=True, key=own)
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        if config.mtp_depth:
            self.mtp = MultiTokenPrediction(config, key=named_key(key, "mtp"))

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Rows of the embedding in the compute dtype."""
        # clip: JAX's default for ids out of range is a row of NaN, at the price of a mask.
        rows = jnp.take(self.embedding[...], tokens, axis=0, mode="clip")
        return rows.astype(compute_dtype(self.config))

    def output_table(self) -> Float[Array, "V D"]:
        """The head, which is the embedding where the two are tied."""
        return (self.embedding if self.config.tied_embedding else self.head)[...]

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        *,
        key: Array | None = None,
        shift: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        """The residual stream before the final norm, and the statistics of the sparse blocks.

        `segments` numbers the documents of each row. A `key` marks a training step, with dropout
        and routing noise. `shift` is added to the embeddings. Statistics carry a leading layer
        axis. They are None for a dense model.
        """
        context = stages.whole_documents(self.config, tokens, segments, key)
        x, _, stats = self._run(context, Caches(None, None), shift)
        return x, stats

    def extend(
        self,
        tokens: Int[Array, "B L"],
        start: Int[Array, ""],
        caches: Caches,
        segments: Int[Array, "B slots"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Caches]:
        """`hidden` for tokens from position `start` on, and the KV caches extended by them.

        `caches` holds the keys and values of all tokens before `start`. `segments` numbers the
        documents of all slots. None: they are one document.
        """
        of_any_layer = caches.dense or caches.sparse
        assert of_any_layer is not None
        slots = of_any_layer[0].shape[2]  # [layers, B, slots, …]
        context = stages.next_tokens(self.config, tokens, start, slots, segments)
        x, caches, _ = self._run(context, caches)
        return x, caches

    def begin(
        self,
        context: stages.Context,
        cache: Cache | None = None,
        shift: Float[Array, "B L D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """The residual stream before the first sparse block, and the dense blocks' caches.

        Training and decoding with experts in tiers run this as one program.
        """
        x = stages.begin(self, context, shift)
        if self.config.dense_layers:
            x, cache, _ = stages.run_stack(self.dense, x, context, cache)
        return x, cache

    def _run(
        self, context: stages.Context, caches: Caches, shift: Array | None = None
    ) -> tuple[Array, Caches, RouterStats | None]:
        x, dense = self.begin(context, caches.dense, shift)
        sparse = None
        stats = None
        if self.config.moe_layers:
            x, sparse, stats = stages.run_stack(self.sparse, x, context, caches.sparse)
        return x, Caches(dense, sparse), stats

    def logits(
        self, hidden: Float[Array, "B L D"], norm: RMSNorm | None = None
    ) -> Float[Array, "B L V"]:
        """The logits of every position (stages.end). `norm` replaces the model's final norm."""
        return stages.end(self, hidden, norm)

    def __call__(
        self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"]
    ) -> Float[Array, "B L V"]:
        """Logits of the next token at every position."""
        return self.logits(self.hidden(tokens, segments)[0])

    def empty_caches(self, batch: int, slots: int) -> Caches:
        """Room for `slots` tokens in every layer, in the compute dtype."""
        dtype = compute_dtype(self.config)

        def stacked(layers: int) -> Cache | None:
            one = empty_cache(self.config.attention, batch, slots, dtype)
            # Attention of either kind caches two arrays: keys and values, or latents and rope keys.
            first, second = (jnp.broadcast_to(part, (layers, *part.shape)) for part in one)
            return (first, second) if layers else None

        return Caches(stacked(self.config.dense_layers), stacked(self.config.moe_layers))
