"""Who is busy, and for how long: balance losses, locality, and the bias update without a loss."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.parallel.mesh import mean_over_data, sum_over_data


def update_bias(
    bias: Float[Array, "*layers E"], load: Int[Array, "*layers E"], rate: Float[Array, ""] | float
) -> Float[Array, "*layers E"]:
    """b_e + rate · sign(mean load - load_e): overloaded down, underloaded up (arXiv:2408.15664).

    Runs after the optimizer's update on the load of the whole batch; it is not a gradient.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def sequence_loss(scores: Float[Array, "B L E"], per_token: int) -> Float[Array, ""]:
    """Mean over sequences of sum_e f_e P_e; 1 when balanced (arXiv:2412.19437, eq. 17-20).

    f_e = E / (K L) · how often e is among a token's top K unbiased scores; P_e = mean over the
    sequence of s_e / sum s. The gradient flows through P only.
    """
    _, length, experts = scores.shape
    _, chosen = lax.top_k(lax.stop_gradient(scores), per_token)
    frequency = _picked(chosen, experts).sum(axis=1) * experts / (per_token * length)
    probability = _normalised(scores).mean(axis=1)
    return (frequency * probability).sum(axis=-1).mean()


def expert_loss(
    scores: Float[Array, "T E"], load: Int[Array, "E"], groups: int | None = None
) -> Float[Array, ""]:
    """sum_g f_g P_g over the whole batch; 1 when balanced (arXiv:2401.06066, eq. 12-17).

    f_e = E / (K T) · load_e and P_e = mean over tokens of s_e / sum s: the expert-level loss. With
    `groups` the device-level one: f_g is the mean of f over the group's experts, P_g the sum of P.
    Under data parallelism both means are taken over all devices. The gradient flows through P.
    """
    experts = scores.shape[-1]
    probability = _normalised(scores).mean(axis=0)
    load = sum_over_data(load)
    probability = mean_over_data(probability)
    frequency = load * (experts / jnp.maximum(load.sum(), 1))
    if groups is not None:
        frequency = frequency.reshape(groups, -1).mean(axis=1)
        probability = probability.reshape(groups, -1).sum(axis=1)
    return (frequency * probability).sum()


def locality_loss(
    scores: Float[Array, "B L E"], chosen: Int[Array, "B L K"], window: int = 8
) -> Float[Array, ""]:
    """1 - mean over tokens of sum_e f_te P_te: 0 where every token stays with the last ones'
    experts, 1 - K/E where nothing is preferred.

    f_te = share of the up to `window` tokens before t that went to e (0 for the first token);
    P_te = s_te / sum_e s_te. The gradient flows through P only. It is f P of the balance losses
    with the other sign and a memory of a few tokens instead of a sequence: experts that stay in use
    need not be fetched (moe_jax.placement), and over longer stretches the balance losses still
    hold.
    """
    *_, length, experts = scores.shape
    # Before token t: all picks so far, less those that are older than the window.
    sums = jnp.cumsum(_picked(chosen, experts), axis=1)
    sums = jnp.pad(sums, ((0, 0), (1, 0), (0, 0)))[:, :length]
    older = jnp.pad(sums, ((0, 0), (window, 0), (0, 0)))[:, :length]
    seen = jnp.clip(jnp.arange(length), 1, window)[:, None]
    frequency = lax.stop_gradient((sums - older) / seen)
    return 1 - (frequency * _normalised(scores)).sum(axis=-1).mean()


def z_loss(logits: Float[Array, "*batch E"]) -> Float[Array, ""]:
    """mean(logsumexp(logits)²): keeps router logits small (arXiv:2202.08906, eq. 5)."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)


def router_entropy(scores: Float[Array, "*batch E"]) -> Float[Array, ""]:
    """Mean entropy, in nats, of the affinities normalised over experts: log E when indifferent."""
    p = _normalised(scores)
    return -jnp.mean(jnp.sum(p * jnp.log(p + 1e-20), axis=-1))


def _picked(chosen: Int[Array, "*batch K"], experts: int) -> Float[Array, "*batch E"]:
    """1 where an expert is among a token's chosen ones."""
    return jnp.any(chosen[..., None] == jnp.arange(experts), axis=-2).astype(jnp.float32)


def _normalised(scores: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """s_e / sum s."""
    return scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
