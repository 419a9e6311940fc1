"""The specification in plain jnp, with jax.lax.top_k. Its gradient is autodiff's."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_kernels.gate.config import GateConfig


def gate(
    logits: Float[Array, "T E"], bias: Float[Array, "E"] | None, config: GateConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Returns (experts, weights, scores). api.gate has the formulas."""
    logits = logits.astype(jnp.float32)
    sigmoid = config.function == "sigmoid"
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    selection = scores if bias is None else scores + bias
    if config.chooses_by_logits(bias is not None):
        selection = logits
    experts = select(lax.stop_gradient(selection), config)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.normalise:
        # 1e-20, DeepSeek-V3's: sigmoids of very negative logits may all be zero.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, config.scale * weights, scores


def select(selection: Float[Array, "T E"], config: GateConfig) -> Int[Array, "T K"]:
    """The K best experts of the best groups. The lower index wins a tie, and NaN wins over all."""
    tokens, experts = selection.shape
    # top_k orders NaN by its sign bit, so a negative NaN would come last and stay unseen.
    selection = jnp.where(jnp.isnan(selection), jnp.nan, selection)
    if config.groups_per_token < config.groups:
        grouped = selection.reshape(tokens, config.groups, experts // config.groups)
        best, _ = lax.top_k(grouped, min(config.representatives, grouped.shape[2]))
        _, winners = lax.top_k(best.sum(axis=-1), config.groups_per_token)
        keep = jnp.any(winners[:, :, None] == jnp.arange(config.groups), axis=1)
        selection = jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)
    return lax.top_k(selection, config.per_token)[1]
