"""Multi-token prediction: one further block for each further token (arXiv:2412.19437, §2.2)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.base.initial import layer_keys, named_key
from moe_jax.config import ModelConfig
from moe_jax.data.batches import shifted_targets
from moe_jax.model.block import Block
from moe_jax.model.linear import Linear
from moe_jax.model.norm import RMSNorm
from moe_jax.model.stages import Context, run_block, whole_documents
from moe_jax.moe.layer import RouterStats

if TYPE_CHECKING:
    from moe_jax.model.transformer import Transformer


class MTPModule(nnx.Module):
    """h^k_i = block(M [norm(h^{k-1}_i); norm(Emb(t_{i+k}))]) (eq. 21-22).

    With ModelConfig.mtp_input "normed", h^{k-1} has passed the norm of the head before.
    M is `projection`, [2D, D]. `norm` is applied by the head, after the block.
    """

    def __init__(self, config: ModelConfig, *, key: Array) -> None:
        self.config = config
        width = config.width
        epsilon = config.norm_epsilon
        dtype = jnp.dtype(config.param_dtype)
        self.hidden_norm = RMSNorm(width, epsilon, dtype)
        self.embedding_norm = RMSNorm(width, epsilon, dtype)
        own = named_key(key, "projection")
        self.projection = Linear(
            2 * width,
            width,
            std=config.init_std,
            dtype=dtype,
            gradient=config.gradient_dtype,
            key=own,
        )
        self.block = Block(config, sparse=config.moe_layers > 0, key=named_key(key, "block"))
        self.norm = RMSNorm(width, epsilon, dtype)

    def __call__(
        self, hidden: Float[Array, "B L D"], embedded: Float[Array, "B L D"], context: Context
    ) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        joined = [self.hidden_norm(hidden), self.embedding_norm(embedded)]
        x = self.projection(jnp.concatenate(joined, axis=-1))
        x, _, stats = run_block(self.block, x, context)
        return x, stats


class MultiTokenPrediction(nnx.Module):
    """`mtp_depth` modules in a chain. Embedding and head are the main model's."""

    def __init__(self, config: ModelConfig, *, key: Array) -> None:
        self.depth = config.mtp_depth

        # Stacked like the blocks of a Stack: roles and the counting then need no second case.
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: Array) -> MTPModule:
            return MTPModule(config, key=key)

        self.modules = make(layer_keys(key, self.depth))

    def predictions(
        self,
        model: "Transformer",
        hidden: Float[Array, "B L D"],
        tokens: Int[Array, "B N"],
        segments: Int[Array, "B N"],
        key: Array | None = None,
    ) -> Iterator[tuple[int, Float[Array, "B L V"], RouterStats | None]]:
        """For k = 1 … depth: (k, logits of token i + k + 1 at position i, statistics).

        `tokens` and `segments` reach beyond the sequence: N >= L + depth. Position i counts at
        depth k if token i + k is of its document. An iterator, so that the logits of one depth need
        not stay in memory beside those of the next.
        """
        length = hidden.shape[1]
        graph, parameters = nnx.split(self.modules)
        norm = model.norm
        # No scan: the depth is 1 or 2, and each depth reads its own shift of the tokens.
        for index in range(self.depth):
            module = nnx.merge(graph, jax.tree.map(lambda leaf, i=index: leaf[i], parameters))
            # Position i reads token i + k, which may lie in a later document. Then no router counts
            # it, and its hidden state is 0: nothing at it reaches the others.
            ahead, same = shifted_targets(tokens, segments, length, index + 1)
            own = segments[:, :length]
            context = whole_documents(model.config, ahead, own, key).at("mtp", index)
            context = context._replace(documents=jnp.where(same, own, 0))
            if model.config.mtp_input == "normed":
                hidden = norm(hidden)
            norm = module.norm
            hidden = jnp.where(same[..., None], hidden, 0)
            hidden, stats = module(hidden, model.embed(ahead), context)
            yield index + 1, model.logits(hidden, norm), stats
