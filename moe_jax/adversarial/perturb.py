"""Adversarial perturbations of the input, and random ones as controls.

The input is perturbed by a shift of the embeddings in an L2 ball (virtual adversarial training,
arXiv:1704.03976, on embeddings as in arXiv:1605.07725), or by swapping tokens to first order
(HotFlip, arXiv:1712.06751). Neither uses the next tokens as labels. A perturbation made from the
cross-entropy of later targets would let a causal model read the targets off its input.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

Shift = Float[Array, "B L D"]


def to_ball(direction: Shift, radius: Float[Array, "B"] | float) -> Shift:
    """direction · radius / |direction| for each sequence. A zero direction stays zero."""
    direction = direction.astype(jnp.float32)
    # Scaled first: the squares of a gradient of 1e-25 would vanish in float32.
    largest = jnp.abs(direction).max(axis=(1, 2), keepdims=True)
    direction = direction / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(direction**2, axis=(1, 2), keepdims=True))
    factor = jnp.asarray(radius, jnp.float32) * jnp.ones(len(direction))
    return factor[:, None, None] * direction / jnp.where(norm > 0, norm, 1)


def radius_of(embedded: Float[Array, "B L D"], size: float) -> Float[Array, "B"]:
    """size · the L2 norm of each sequence's embeddings, so that `size` has no unit.

    No gradient passes through the result.
    """
    norm = jnp.sqrt(jnp.sum(embedded.astype(jnp.float32) ** 2, axis=(1, 2)))
    return lax.stop_gradient(size * norm)


def random_shift(key: Array, like: Shift, radius: Float[Array, "B"] | float) -> Shift:
    """The control: a shift of length `radius` in a direction drawn uniformly."""
    return to_ball(jax.random.normal(key, like.shape), radius)


def adversarial_shift(
    divergence: Callable[[Shift], Float[Array, ""]],
    key: Array,
    like: Shift,
    radius: Float[Array, "B"],
    *,
    steps: int = 1,
    probe: float = 0.1,
) -> Shift:
    """The shift of length `radius` that raises `divergence`, KL(q(x) ‖ q(x + shift)), most.

    KL has its minimum, 0, at no shift. To second order it is shiftᵀ H shift / 2, and the worst
    direction is the leading eigenvector of H. The gradient at a small shift is H · shift, so power
    iteration needs no H: d <- grad divergence(probe · d) (arXiv:1704.03976, eq. 10-12). `probe` is
    the length of the small shift as a fraction of `radius`. No gradient passes through the result.
    """
    direction = random_shift(key, like, 1.0)
    for _ in range(steps):
        direction = to_ball(jax.grad(divergence)(to_ball(direction, probe * radius)), 1.0)
    return lax.stop_gradient(to_ball(direction, radius))


def random_swaps(
    key: Array, tokens: Int[Array, "B L"], count: int, vocabulary: int
) -> Int[Array, "B L"]:
    """The control: `count` random positions of a row get another random token below `vocabulary`.

    The first position is never swapped.
    """
    position_key, token_key = jax.random.split(key)
    score = jax.random.uniform(position_key, tokens.shape)
    # Added modulo V, 1 … V-1 gives every token but the present one.
    other = 1 + jax.random.randint(token_key, tokens.shape, 0, vocabulary - 1)
    return _swapped(tokens, score, (tokens + other) % vocabulary, count)


def adversarial_swaps(
    gradient: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    count: int,
    vocabulary: int,
) -> Int[Array, "B L"]:
    """`count` positions of a row get the token below `vocabulary` that raises a loss most.

    To first order, token v at a position with embedding gradient g raises the loss by
    g · (E_v - E_now). The first position is never swapped.
    """
    now = jnp.take(table, tokens, axis=0, mode="clip")
    rise = jnp.einsum("bld,vd->blv", gradient, table[:vocabulary])
    rise -= jnp.einsum("bld,bld->bl", gradient, now)[..., None]
    rise = jnp.where(jnp.arange(vocabulary) == tokens[..., None], -jnp.inf, rise)
    return _swapped(tokens, rise.max(-1), rise.argmax(-1).astype(tokens.dtype), count)


def _swapped(
    tokens: Int[Array, "B L"], score: Float[Array, "B L"], other: Int[Array, "B L"], count: int
) -> Int[Array, "B L"]:
    """`tokens` with `other` at the `count` positions of a row that score highest."""
    # The first token starts the document for all the later ones.
    score = score.at[:, 0].set(-jnp.inf)
    places = lax.top_k(score, count)[1]
    rows = jnp.arange(len(tokens))[:, None]
    return tokens.at[rows, places].set(jnp.take_along_axis(other, places, axis=1))
