"""Adversarial perturbations of the input, and random ones as controls.

The input is perturbed by a shift of the embeddings in an L2 ball (virtual adversarial training,
arXiv:1704.03976, on embeddings as in arXiv:1605.07725), or by swapping tokens to first order
(HotFlip, arXiv:1712.06751). Neither uses the next tokens as labels. A perturbation made from the
cross-entropy of later targets would let a causal model read the targets off its input.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.parallel.mesh import own_draw

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


def random_shift(
    key: Array,
    like: Shift,
    radius: Float[Array, "B"] | float,
    counted: Bool[Array, "B L"] | None = None,
) -> Shift:
    """The control: a shift of length `radius` in a direction drawn uniformly.

    Positions that `counted` leaves out are not shifted.
    """
    direction = own_draw(partial(jax.random.normal, key), like.shape)
    if counted is not None:
        direction = jnp.where(counted[..., None], direction, 0)
    return to_ball(direction, radius)


def adversarial_shift(
    divergence: Callable[[Shift], Float[Array, ""]],
    key: Array,
    like: Shift,
    radius: Float[Array, "B"],
    *,
    steps: int = 1,
    probe: float = 0.1,
    counted: Bool[Array, "B L"] | None = None,
) -> Shift:
    """The shift of length `radius` that raises `divergence`, KL(q(x) ‖ q(x + shift)), most.

    KL has its minimum, 0, at no shift. To second order it is shiftᵀ H shift / 2, and the worst
    direction is the leading eigenvector of H. The gradient at a small shift is H · shift, so power
    iteration needs no H: d <- grad divergence(probe · d) (arXiv:1704.03976, eq. 10-12). `probe` is
    the length of the small shift as a fraction of `radius`. The first direction leaves out what
    `counted` does. No gradient passes through the result.
    """
    direction = random_shift(key, like, 1.0, counted)
    for _ in range(steps):
        direction = to_ball(jax.grad(divergence)(to_ball(direction, probe * radius)), 1.0)
    return lax.stop_gradient(to_ball(direction, radius))


def random_swaps(
    key: Array,
    tokens: Int[Array, "B L"],
    count: int,
    vocabulary: int,
    segments: Int[Array, "B L"] | None = None,
) -> Int[Array, "B L"]:
    """The control: `count` random positions of a row get another random token below `vocabulary`.

    The first token of a document is never swapped, nor is padding (segment 0).
    """
    position_key, token_key = jax.random.split(key)
    score = own_draw(partial(jax.random.uniform, position_key), tokens.shape)
    # Added modulo V, 1 … V-1 gives every token but the present one.
    draw = partial(jax.random.randint, token_key, minval=0, maxval=vocabulary - 1)
    other = 1 + own_draw(draw, tokens.shape)
    return _swapped(tokens, score, (tokens + other) % vocabulary, count, segments)


def adversarial_swaps(
    gradient: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    tokens: Int[Array, "B L"],
    count: int,
    vocabulary: int,
    segments: Int[Array, "B L"] | None = None,
) -> Int[Array, "B L"]:
    """`count` positions of a row get the token below `vocabulary` that raises a loss most.

    To first order, token v at a position with embedding gradient g raises the loss by
    g · (E_v - E_now). The first token of a document is never swapped, nor is padding (segment 0).
    """
    now = jnp.take(table, tokens, axis=0, mode="clip")
    rise = jnp.einsum("bld,vd->blv", gradient, table[:vocabulary])
    rise -= jnp.einsum("bld,bld->bl", gradient, now)[..., None]
    rise = jnp.where(jnp.arange(vocabulary) == tokens[..., None], -jnp.inf, rise)
    best = rise.argmax(-1).astype(tokens.dtype)
    return _swapped(tokens, rise.max(-1), best, count, segments)


def _swapped(
    tokens: Int[Array, "B L"],
    score: Float[Array, "B L"],
    other: Int[Array, "B L"],
    count: int,
    segments: Int[Array, "B L"] | None,
) -> Int[Array, "B L"]:
    """`tokens` with `other` at the `count` positions of a row that score highest."""
    if segments is None:
        segments = jnp.ones_like(tokens)
    # The first token of a document starts it for all the later ones.
    inside = (segments != 0) & (segments == jnp.pad(segments[:, :-1], ((0, 0), (1, 0))))
    score = jnp.where(inside, score, -jnp.inf)
    # A row may have fewer than `count` such positions.
    other = jnp.where(inside, other, tokens)
    places = lax.top_k(score, count)[1]
    rows = jnp.arange(len(tokens))[:, None]
    return tokens.at[rows, places].set(jnp.take_along_axis(other, places, axis=1))
