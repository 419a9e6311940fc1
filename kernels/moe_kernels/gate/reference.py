"""The specification in plain jnp, with jax.lax.top_k; its gradient is autodiff's."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_kernels.gate.shapes import Choice


def gate(
    logits: Float[Array, "T E"], bias: Float[Array, "E"] | None, choice: Choice
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """(experts, weights, scores); see api.gate for the formulas."""
    logits = logits.astype(jnp.float32)
    sigmoid = choice.function == "sigmoid"
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    selection = scores if bias is None else scores + bias
    experts = select(lax.stop_gradient(selection), choice)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if choice.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, choice.scale * weights, scores


def select(selection: Float[Array, "T E"], choice: Choice) -> Int[Array, "T K"]:
    """The K best of the best groups; the lower index wins a tie, and NaN against any number."""
    tokens, experts = selection.shape
    selection = jnp.where(jnp.isnan(selection), jnp.nan, selection)  # -NaN would come last
    if choice.groups_per_token < choice.groups:
        grouped = selection.reshape(tokens, choice.groups, experts // choice.groups)
        best, _ = lax.top_k(grouped, min(choice.representatives, grouped.shape[2]))
        _, winners = lax.top_k(best.sum(axis=-1), choice.groups_per_token)
        keep = jnp.any(winners[:, :, None] == jnp.arange(choice.groups), axis=1)
        selection = jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
    return lax.top_k(selection, choice.per_token)[1]
