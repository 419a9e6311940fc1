"""The objective of pre-training: cross-entropy of the next token."""

from moe_jax.data.batches import shifted_targets
from moe_jax.objectives.base import Loss, Reading, token_nats


def next_token(reading: Reading) -> Loss:
    """sum over valid targets of -log p(target) / their number in the batch, in nats."""
    batch = reading.batch
    # All logits at once. Distillation goes through the vocabulary in chunks (distill.chunked).
    logits = reading.model.logits(reading.hidden)
    targets, mask = shifted_targets(batch["tokens"], batch["segments"], reading.length, 1)
    return Loss(token_nats(logits, targets, mask) / reading.normaliser)
