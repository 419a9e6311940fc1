"""Step 1: which K experts a token goes to, and with what weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import MoEConfig


class Route(NamedTuple):
    """A routing decision, with what the balance losses need."""

    experts: Int[Array, "T K"]
    """Chosen experts, best first; distinct within a token."""
    weights: Float[Array, "T K"]
    """Factors on the chosen experts' outputs (float32)."""
    scores: Float[Array, "T E"]
    """Affinities before any bias: softmax or sigmoid of the logits (float32)."""
    logits: Float[Array, "T E"]
    """Router outputs (float32)."""


def route(logits: Float[Array, "T E"], bias: Float[Array, "E"], config: MoEConfig) -> Route:
    """Applies the configured gate. Ties go to the lower index; NaN logits give NaN weights."""
    logits = logits.astype(jnp.float32)
    if config.gate == "softmax":
        scores = selection = jax.nn.softmax(logits, axis=-1)
        representatives = 1
    else:
        scores = jax.nn.sigmoid(logits)
        selection = scores + bias
        representatives = 2
    if config.groups_per_token < config.groups:
        selection = limit_groups(selection, config.groups, config.groups_per_token, representatives)
    _, experts = lax.top_k(lax.stop_gradient(selection), config.experts_per_token)
    weights = gate_weights(scores, experts, config.normalise, config.scale)
    return Route(experts, weights, scores, logits)


def gate_weights(
    scores: Float[Array, "T E"], experts: Int[Array, "T K"], normalise: bool, scale: float
) -> Float[Array, "T K"]:
    """scale · s[t, e_k], divided by its sum over k if `normalise` (arXiv:2412.19437, eq. 13).

    The selection bias is not part of `scores`: it decides who is chosen, never how much counts.
    """
    chosen = jnp.take_along_axis(scores, experts, axis=-1)
    if normalise:
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return scale * chosen


def limit_groups(
    scores: Float[Array, "T E"], groups: int, kept: int, representatives: int
) -> Float[Array, "T E"]:
    """Sets the scores of all but the best `kept` groups to -inf (arXiv:2412.19437, §2.1.2).

    A group (E / groups neighbouring experts) is as good as the sum of its best `representatives`
    scores: 2 in DeepSeek-V3, 1 where there is no selection bias.
    """
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, experts // groups)
    best, _ = lax.top_k(grouped, min(representatives, experts // groups))
    _, winners = lax.top_k(best.sum(axis=-1), kept)
    keep = jnp.any(winners[:, :, None] == jnp.arange(groups), axis=1)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
