"""Balance losses, the locality loss, and the router-bias update that balances without a loss.

Every loss is over the tokens that count: those that belong to a document. `counted` and `documents`
are None where all do. With `optim.accumulation` the losses are those of the micro-batches, averaged
by their counted tokens. For the means over tokens and sequences this is the whole batch's loss.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.parallel.mesh import sum_over_batch


def update_bias(
    bias: Float[Array, "*layers E"], load: Int[Array, "*layers E"], rate: Float[Array, ""] | float
) -> Float[Array, "*layers E"]:
    """b_e + rate · sign(mean load - load_e) (arXiv:2408.15664).

    The bias of an overloaded expert falls, that of an underloaded one rises. This runs after the
    optimizer's update, on the load of the whole batch. It is not a gradient.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def sequence_loss(
    scores: Float[Array, "B L E"], per_token: int, counted: Bool[Array, "B L"] | None = None
) -> Float[Array, ""]:
    """Mean over sequences of sum_e f_e P_e, which is 1 when balanced (arXiv:2412.19437, eq. 17-20).

    f_e = E / (K n) · how often e is among a token's top K unbiased scores. P_e is the mean over the
    sequence of s_e / sum s. A sequence is a row of the batch, whatever documents it holds. Its
    length n is the number of its counted tokens, and sequences weigh by it. The gradient flows
    through P only.
    """
    *shape, experts = scores.shape
    counted = _all_or(counted, shape)
    # Chosen anew from the scores: the router's own choice includes the bias, and its groups.
    _, chosen = lax.top_k(lax.stop_gradient(scores), per_token)
    number = counted.sum(axis=1)  # [B]
    length = jnp.maximum(number, 1)[:, None]
    picked = jnp.where(counted[..., None], _is_chosen(chosen, experts), 0)
    frequency = picked.sum(axis=1) * (experts / (per_token * length))
    shares = jnp.where(counted[..., None], _normalised(scores), 0)
    probability = shares.sum(axis=1) / length
    return weighted_mean((frequency * probability).sum(axis=-1), number)


def expert_loss(
    scores: Float[Array, "T E"],
    load: Int[Array, "E"],
    groups: int | None = None,
    counted: Bool[Array, "T"] | None = None,
) -> Float[Array, ""]:
    """sum_g f_g P_g over a micro-batch, which is 1 when balanced (arXiv:2401.06066, eq. 12-17).

    Expert level: f_e = E / sum(load) · load_e, and P_e is the mean over counted tokens of
    s_e / sum s. Device level (with `groups`): f_g is the mean of f over the group's experts, P_g
    the sum of P. Under data parallelism both means are taken over all devices. The gradient flows
    through P only.

    With `optim.accumulation` f is the micro-batch's own, and the losses of the micro-batches are
    averaged: the value depends on the accumulation. The whole batch's f would take a second pass,
    because every micro-batch's gradient needs it.
    """
    experts = scores.shape[-1]
    probability = weighted_mean(_normalised(scores), _all_or(counted, scores.shape[:1]))
    load = sum_over_batch(load)
    # By the actual sum and not K T, because a rule may choose fewer experts than K. 1: no division
    # by zero where nothing was chosen.
    frequency = load * (experts / jnp.maximum(load.sum(), 1))
    if groups is not None:
        frequency = frequency.reshape(groups, -1).mean(axis=1)
        probability = probability.reshape(groups, -1).sum(axis=1)
    return (frequency * probability).sum()


def locality_loss(
    scores: Float[Array, "B L E"],
    chosen: Int[Array, "B L K"],
    window: int = 8,
    documents: Int[Array, "B L"] | None = None,
) -> Float[Array, ""]:
    """Mean over counted tokens of 1 - sum_e f_te P_te.

    f_te is the share of the up to `window` tokens before t in its document that went to e (0 for
    the first token), and P_te = s_te / sum_e s_te. The gradient flows through P only. The loss is
    near 0 where every token stays with the experts of the tokens before it, and 1 - K/E where
    nothing is preferred.

    It is f P of the balance losses with the other sign, over a few tokens instead of a sequence.
    Experts that stay in use need not be fetched (moe_jax.placement). Over longer stretches the
    balance losses still balance.
    """
    rows, length, experts = scores.shape
    places = jnp.arange(length)
    counted = _all_or(None if documents is None else documents != 0, (rows, length))
    begin = jnp.maximum(places - window, 0) * jnp.ones((rows, 1), jnp.int32)
    if documents is not None:
        begin = jnp.maximum(begin, _document_starts(documents))
    # sums[t] counts the choices of tokens before t. The count at the window's begin is taken off.
    sums = jnp.cumsum(_is_chosen(chosen, experts), axis=1)
    sums = jnp.pad(sums, ((0, 0), (1, 0), (0, 0)))[:, :length]
    older = jnp.take_along_axis(sums, begin[..., None], axis=1)
    # How many tokens the window holds. The first token of a document divides 0 by 1.
    seen = jnp.maximum(places - begin, 1)[..., None]
    frequency = lax.stop_gradient((sums - older) / seen)
    kept = (frequency * _normalised(scores)).sum(axis=-1)
    return weighted_mean(1 - kept.reshape(-1), counted.reshape(-1))


def z_loss(
    logits: Float[Array, "*batch E"], counted: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    """mean(logsumexp(logits)²): keeps router logits small (arXiv:2202.08906, eq. 5)."""
    values = jax.nn.logsumexp(logits, axis=-1) ** 2
    return weighted_mean(values.reshape(-1), _all_or(counted, values.shape).reshape(-1))


def router_entropy(
    scores: Float[Array, "*batch E"], counted: Bool[Array, "*batch"] | None = None
) -> Float[Array, ""]:
    """Mean entropy, in nats, of the affinities normalised over experts. The largest is log E."""
    p = _normalised(scores)
    values = -jnp.sum(p * jnp.log(p + 1e-20), axis=-1)
    return weighted_mean(values.reshape(-1), _all_or(counted, values.shape).reshape(-1))


def weighted_mean(
    values: Float[Array, "N *shape"], weights: Int[Array, "N"] | Bool[Array, "N"]
) -> Float[Array, "*shape"]:
    """sum_n weights[n] · values[n] / sum(weights), with both sums over all devices.

    Values of weight 0 have no part in it, not even as NaN. Without any weight the mean is 0.
    """
    factor = weights.reshape(-1, *[1] * (values.ndim - 1))
    total = sum_over_batch(jnp.where(factor > 0, factor * values, 0).sum(axis=0))
    return total / jnp.maximum(sum_over_batch(weights.sum()), 1)


def _all_or(counted: Bool[Array, "*batch"] | None, shape: Sequence[int]) -> Bool[Array, "*batch"]:
    # A constant, so that the selections by it are compiled to nothing.
    return jnp.ones(shape, bool) if counted is None else counted


def _document_starts(documents: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The position at which each token's document begins in its row."""
    places = jnp.arange(documents.shape[1])
    begins = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(begins, places, 0), axis=1)


def _is_chosen(chosen: Int[Array, "*batch K"], experts: int) -> Float[Array, "*batch E"]:
    """1 where an expert is among a token's chosen ones."""
    return jnp.any(chosen[..., None] == jnp.arange(experts), axis=-2).astype(jnp.float32)


def _normalised(scores: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """s_e / sum s."""
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
