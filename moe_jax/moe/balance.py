"""Balance losses, the locality loss, and the router-bias update that balances without a loss."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.parallel.mesh import mean_over_data, sum_over_data


def update_bias(
    bias: Float[Array, "*layers E"], load: Int[Array, "*layers E"], rate: Float[Array, ""] | float
) -> Float[Array, "*layers E"]:
    """b_e + rate · sign(mean load - load_e) (arXiv:2408.15664).

    The bias of an overloaded expert falls, that of an underloaded one rises. This runs after the
    optimizer's update, on the load of the whole batch. It is not a gradient.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def sequence_loss(scores: Float[Array, "B L E"], per_token: int) -> Float[Array, ""]:
    """Mean over sequences of sum_e f_e P_e, which is 1 when balanced (arXiv:2412.19437, eq. 17-20).

    f_e = E / (K L) · how often e is among a token's top K unbiased scores. P_e is the mean over the
    sequence of s_e / sum s. The gradient flows through P only.
    """
    _, length, experts = scores.shape
    # Chosen anew from the scores: the router's own choice includes the bias, and its groups.
    _, chosen = lax.top_k(lax.stop_gradient(scores), per_token)
    frequency = _is_chosen(chosen, experts).sum(axis=1) * experts / (per_token * length)
    probability = _normalised(scores).mean(axis=1)
    return (frequency * probability).sum(axis=-1).mean()


def expert_loss(
    scores: Float[Array, "T E"], load: Int[Array, "E"], groups: int | None = None
) -> Float[Array, ""]:
    """sum_g f_g P_g over the whole batch, which is 1 when balanced (arXiv:2401.06066, eq. 12-17).

    Expert level: f_e = E / (K T) · load_e, and P_e is the mean over tokens of s_e / sum s. Device
    level (with `groups`): f_g is the mean of f over the group's experts, P_g the sum of P. Under
    data parallelism both means are taken over all devices. The gradient flows through P only.
    """
    experts = scores.shape[-1]
    probability = _normalised(scores).mean(axis=0)
    load = sum_over_data(load)
    probability = mean_over_data(probability)
    # By the actual sum and not K T, because a rule may choose fewer experts than K. 1: no division
    # by zero where nothing was chosen.
    frequency = load * (experts / jnp.maximum(load.sum(), 1))
    if groups is not None:
        frequency = frequency.reshape(groups, -1).mean(axis=1)
        probability = probability.reshape(groups, -1).sum(axis=1)
    return (frequency * probability).sum()


def locality_loss(
    scores: Float[Array, "B L E"], chosen: Int[Array, "B L K"], window: int = 8
) -> Float[Array, ""]:
    """1 - mean over tokens of sum_e f_te P_te.

    f_te is the share of the up to `window` tokens before t that went to e (0 for the first token),
    and P_te = s_te / sum_e s_te. The gradient flows through P only. The loss is near 0 where every
    token stays with the experts of the tokens before it, and 1 - K/E where nothing is preferred.

    It is f P of the balance losses with the other sign, over a few tokens instead of a sequence.
    Experts that stay in use need not be fetched (moe_jax.placement). Over longer stretches the
    balance losses still balance.
    """
    *_, length, experts = scores.shape
    # sums[t] counts the choices of tokens before t. The count `window` tokens earlier is taken off.
    sums = jnp.cumsum(_is_chosen(chosen, experts), axis=1)
    sums = jnp.pad(sums, ((0, 0), (1, 0), (0, 0)))[:, :length]
    older = jnp.pad(sums, ((0, 0), (window, 0), (0, 0)))[:, :length]
    # How many tokens the window holds at each position. The first token divides 0 by 1.
    seen = jnp.clip(jnp.arange(length), 1, window)[:, None]
    frequency = lax.stop_gradient((sums - older) / seen)
    return 1 - (frequency * _normalised(scores)).sum(axis=-1).mean()


def z_loss(logits: Float[Array, "*batch E"]) -> Float[Array, ""]:
    """mean(logsumexp(logits)²): keeps router logits small (arXiv:2202.08906, eq. 5)."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def router_entropy(scores: Float[Array, "*batch E"]) -> Float[Array, ""]:
    """Mean entropy, in nats, of the affinities normalised over experts. The largest is log E."""
    p = _normalised(scores)
    return -jnp.mean(jnp.sum(p * jnp.log(p + 1e-20), axis=-1))


def _is_chosen(chosen: Int[Array, "*batch K"], experts: int) -> Float[Array, "*batch E"]:
    """1 where an expert is among a token's chosen ones."""
    return jnp.any(chosen[..., None] == jnp.arange(experts), axis=-2).astype(jnp.float32)


def _normalised(scores: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """s_e / sum s."""
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
