"""Data chosen by losses: DoReMi's min-max over sources, and selection by excess loss.

DoReMi (arXiv:2305.10429, algorithm 1) is a game: the proxy model minimises a weighted loss, and the
weights rise where the proxy is furthest above a reference model. The averaged weights are the
mixture on which the real model is trained.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.errors import require


def group_excess(
    losses: Float[Array, "N"],
    reference: Float[Array, "N"],
    group: Int[Array, "N"],
    groups: int,
) -> Float[Array, "G"]:
    """l_g = mean over g's items of max(loss - reference, 0). 0 for a source without an item."""
    excess = jnp.maximum(losses - reference, 0)
    sums = jnp.zeros(groups).at[group].add(excess)
    return sums / jnp.maximum(jnp.zeros(groups).at[group].add(1.0), 1)


def doremi_update(
    weights: Float[Array, "G"],
    excess: Float[Array, "G"],
    *,
    rate: float = 1.0,
    smoothing: float = 1e-3,
) -> Float[Array, "G"]:
    """a <- normalise(a · exp(rate · l)); a <- (1 - smoothing) · a + smoothing / G.

    This is exponentiated gradient ascent. The mixture with the uniform distribution keeps every
    source's weight above 0. UserError: smoothing outside [0, 1].
    """
    require(0 <= smoothing <= 1, f"smoothing is {smoothing}: it must lie between 0 and 1")
    # The maximum cancels in the normalisation, and keeps exp from overflowing.
    risen = weights * jnp.exp(rate * (excess - excess.max()))
    return (1 - smoothing) * risen / risen.sum() + smoothing / weights.shape[0]


def item_weights(
    weights: Float[Array, "G"], proportions: Float[Array, "G"], group: Int[Array, "N"]
) -> Float[Array, "N"]:
    """a_g / pi_g, the weight of an item whose source g is drawn with proportion pi_g.

    The expected weighted loss is then sum_g a_g · loss_g.
    """
    return weights[group] / proportions[group]


def excess_selection(
    losses: Float[Array, "N"], reference: Float[Array, "N"], keep: int
) -> Int[Array, "keep"]:
    """Indices of the `keep` items with the largest loss - reference (RHO-LOSS, arXiv:2206.07137,
    eq. 3).

    If the reference was trained on clean data, these are the items that can be learnt and are not
    learnt yet. The selection is not adversarial: nothing maximises against the model. UserError:
    fewer than `keep` items.
    """
    require(
        0 < keep <= losses.shape[0],
        f"cannot keep {keep} of {losses.shape[0]} candidates: draw more",
    )
    return lax.top_k(lax.stop_gradient(losses - reference), keep)[1]
