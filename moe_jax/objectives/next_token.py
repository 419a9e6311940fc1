"""The loss of one batch: next-token and multi-token cross-entropy plus the balance losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from moe_jax.data.batches import shifted_targets
from moe_jax.model.attention import document_context
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterStats

Batch = dict[str, Array]
"""tokens and segments, int32[B, L + 1 + mtp_depth] each; see data.batches."""


class Losses(NamedTuple):
    """What one batch, or one micro-batch's share of it, contributes."""

    cross_entropy: Float[Array, ""]
    """Sum over valid targets of -log p, divided by `normaliser`; in nats."""
    mtp: Float[Array, ""]
    """The same for multi-token prediction, averaged over depths."""
    balance: Float[Array, ""]
    """The weighted balance losses, summed over layers."""
    stats: dict[str, RouterStats]
    """Router statistics by part of the model ("sparse", "mtp"), with a leading layer axis."""
    distillation: Float[Array, ""] | None = None
    """Where there is a teacher, what is minimised in place of the cross-entropy."""


def token_nats(
    logits: Float[Array, "B L V"], targets: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, ""]:
    """Sum of -log softmax(logits)[target] over the masked positions, in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0))


def valid_targets(batch: Batch, length: int, offset: int = 1) -> Float[Array, ""]:
    """Number of positions that have a target `offset` ahead in the same document, at least 1."""
    _, mask = shifted_targets(batch["tokens"], batch["segments"], length, offset)
    return jnp.maximum(mask.sum(), 1).astype(jnp.float32)


def losses(
    model: Transformer,
    batch: Batch,
    length: int,
    normalisers: list[Array],
    key: Array | None = None,
) -> Losses:
    """Losses of a (micro-)batch. normalisers[k] counts the whole batch's targets at offset k + 1,
    so that micro-batches add up to exactly the gradient of the whole batch. `key` is for routing
    rules that draw or round (moe.rules.Context)."""
    main_key, mtp_key = (None, None) if key is None else jax.random.split(key)
    tokens, segments = batch["tokens"], batch["segments"][:, :length]
    attention = document_context(model.config, segments)
    hidden, _, stats = model.hidden(tokens[:, :length], attention, key=main_key)
    return read_out(model, hidden, stats, batch, length, normalisers, mtp_key)


def read_out(
    model: Transformer,
    hidden: Float[Array, "B L D"],
    stats: RouterStats | None,
    batch: Batch,
    length: int,
    normalisers: list[Array],
    mtp_key: Array | None,
) -> Losses:
    """The losses from the residual stream after the last block and the blocks' statistics."""
    tokens = batch["tokens"]
    targets, mask = shifted_targets(tokens, batch["segments"], length, 1)
    cross_entropy = token_nats(model.logits(hidden), targets, mask) / normalisers[0]
    collected = {} if stats is None else {"sparse": stats._replace(experts=None)}
    mtp = jnp.zeros((), jnp.float32)
    if model.config.mtp_depth:
        mtp, mtp_stats = mtp_loss(model, hidden, batch, length, normalisers[1:], mtp_key)
        collected |= mtp_stats
    balance = sum((s.loss.sum() for s in collected.values()), jnp.zeros((), jnp.float32))
    return Losses(cross_entropy, mtp, balance, collected)


def mtp_loss(
    model: Transformer,
    hidden: Array,
    batch: Batch,
    length: int,
    normalisers: list[Array],
    key: Array | None,
    without: Bool[Array, "B M"] | None = None,
) -> tuple[Array, dict[str, RouterStats]]:
    """lambda-free multi-token loss, 1/depth sum_k CE_k (arXiv:2412.19437, eq. 24-25).

    `without` is true at t where token t + 1 does not count; M is at least length + depth."""
    tokens, segments = batch["tokens"], batch["segments"]
    total, collected = jnp.zeros((), jnp.float32), []
    predictions = model.mtp.predictions(model, hidden, tokens, segments[:, :length], key)
    for depth, logits, stats in predictions:
        targets, mask = shifted_targets(tokens, segments, length, depth + 1)
        if without is not None:
            mask &= ~without[:, depth : depth + length]
        total += token_nats(logits, targets, mask) / normalisers[depth - 1]
        collected.append(stats and stats._replace(experts=None))
    mean = total / model.config.mtp_depth
    if collected[0] is None:
        return mean, {}
    stacked: Any = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
    return mean, {"mtp": stacked}
