"""The objective of pre-training: cross-entropy of the next token."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.data.batches import shifted_targets
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import Batch, Loss, Reading, token_nats


def batch_nats(model: Transformer, hidden: Float[Array, "B L D"], batch: Batch) -> Float[Array, ""]:
    """Sum of -log p over the batch's targets, from the residual stream after the last block.

    Positions without a target in their document have no part in it.
    """
    tokens = batch["tokens"]
    targets, mask = shifted_targets(tokens, batch["segments"], hidden.shape[1], 1)
    hidden = jnp.where(mask[..., None], hidden, 0)
    # All logits at once. Distillation goes through the vocabulary in chunks (distill.chunked).
    return token_nats(model.logits(hidden), targets, mask)


def next_token(reading: Reading) -> Loss:
    """sum over valid targets of -log p(target) / their number in the batch, in nats."""
    nats = batch_nats(reading.model, reading.hidden, reading.batch)
    return Loss(nats / reading.normaliser)
