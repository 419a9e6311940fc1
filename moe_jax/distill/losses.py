"""Losses of a student: its divergence from the teacher, cross-entropy, and mixtures of both.

Every function gives one value for each of N positions, in nats. `total` sums them to a loss. At
position t, teacher and student have read the same tokens, so they are compared without a shift.
Only cross-entropy looks at the next token.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.config import require
from moe_jax.distill.chunked import LazyLogits, VocabularyChunks, divergence, log_normaliser
from moe_jax.distill.divergences import Divergence


def total(
    values: Float[Array, "N"], mask: Bool[Array, "N"], normaliser: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Sum of the values where the mask is true, divided by the normaliser.

    The normaliser counts the valid positions of the *whole* batch, over all micro-batches and
    devices. Then the losses of parts add up to the whole loss, and means of parts would not.
    """
    return jnp.sum(jnp.where(mask, values, 0.0)) / normaliser


def token_logit(of: LazyLogits, tokens: Int[Array, "N"]) -> Float[Array, "N"]:
    """The logit of one token at each position, without the others."""
    rows = jnp.take(of.table, tokens, axis=0, mode="clip").astype(of.hidden.dtype)
    return jnp.einsum("nd,nd->n", of.hidden, rows, preferred_element_type=jnp.float32)


def cross_entropy(
    student: LazyLogits,
    targets: Int[Array, "N"],
    chunks: VocabularyChunks,
    log_z: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """-log softmax(student)[target], at temperature 1 whatever the chunks' temperature is.

    `log_z` is the student's log_normaliser at temperature 1; it is computed if absent. On text that
    the teacher wrote, this is sequence-level distillation (arXiv:1606.07947, eq. 6). On the
    student's own text it would only confirm the student, so a divergence is used there.
    """
    if log_z is None:
        log_z = log_normaliser(student, chunks._replace(temperature=1.0))
    return log_z - token_logit(student, targets)


def distillation(
    student: LazyLogits,
    teachers: Sequence[LazyLogits],
    targets: Int[Array, "N"],
    chunks: VocabularyChunks,
    *,
    kind: Divergence,
    alpha: float,
    weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """(1 - alpha) · CE + alpha · temperature² · divergence (arXiv:1503.02531, §2).

    The factor keeps the divergence's gradient about the same at every temperature.
    """
    require(0 <= alpha <= 1, f"alpha is {alpha}: it must lie between 0 and 1")
    values = jnp.zeros(student.hidden.shape[0], jnp.float32)
    if alpha < 1:
        values += (1 - alpha) * cross_entropy(student, targets, chunks)
    if alpha > 0:
        from_teacher = divergence(student, teachers, chunks, kind, weights)
        values += alpha * chunks.temperature**2 * from_teacher
    return values


def sampled(
    student: LazyLogits,
    samples: Int[Array, "N K"],
    chunks: VocabularyChunks,
    log_z: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """-1/K · sum_k log q(v_k) for v_k drawn from the teacher (arXiv:2503.16870, §4).

    Its expectation is KL(p ‖ q) + H(p). The expectation of its gradient is exactly q - p for
    every K. The samples must have been drawn at the temperature of `chunks`. `log_z` is
    log_normaliser(student, chunks), nearly all of the cost; it is computed if absent.
    """
    if log_z is None:
        log_z = log_normaliser(student, chunks)
    return jnp.mean(log_z[:, None] - _picked(student, samples, chunks), axis=-1)


def top_k_tail(
    student: LazyLogits,
    tokens: Int[Array, "N K"],
    log_p: Float[Array, "N K"],
    chunks: VocabularyChunks,
) -> Float[Array, "N"]:
    """sum_k p_k log(p_k/q_k) + p_tail log(p_tail/q_tail) over the teacher's K best tokens.

    p and q are probabilities over the whole vocabulary, and all other tokens are one event, the
    tail. The sum is KL(p ‖ q) after merging the tail: at most KL(p ‖ q), and 0 if p = q. If both
    were normalised over the K tokens instead, mass on the others would cost the student nothing.
    """
    log_p = log_p.astype(jnp.float32)
    picked = _picked(student, tokens, chunks)
    # The tail is a sum of its own. As 1 - sum q_k it would round to 0 in float32 for a confident
    # student, and its gradient, too.
    tail = log_normaliser(student, chunks, without=tokens)
    log_z = jnp.logaddexp(jax.nn.logsumexp(picked, axis=-1), tail)
    best = jnp.sum(jnp.exp(log_p) * (log_p - picked + log_z[:, None]), axis=-1)
    p_tail = jnp.maximum(1 - jnp.exp(log_p).sum(axis=-1), 0.0)
    # The bound keeps 0 · log 0 from being NaN.
    return best + p_tail * (jnp.log(jnp.maximum(p_tail, 1e-9)) - tail + log_z)


def _picked(
    of: LazyLogits, tokens: Int[Array, "N K"], chunks: VocabularyChunks
) -> Float[Array, "N K"]:
    """logits / temperature of K tokens at each position."""

    # One k at a time, and again in the backward pass: all gathered rows would be [N, K, D].
    @jax.checkpoint
    def one(tokens: Array) -> Array:
        return token_logit(of, tokens) / chunks.temperature

    return lax.map(one, tokens.T).T


def hidden_match(
    student: Float[Array, "N D"],
    teacher: Float[Array, "N teacher_width"],
    projection: Float[Array, "D teacher_width"] | None = None,
) -> Float[Array, "N"]:
    """Mean over D2 of (student · projection - teacher)² (FitNets, arXiv:1412.6550, eq. 3).

    UserError: the widths differ and no projection is given.
    """
    require(
        projection is not None or student.shape[-1] == teacher.shape[-1],
        f"hidden widths {student.shape[-1]} and {teacher.shape[-1]} differ: give a projection",
    )
    mapped = student if projection is None else student @ projection
    error = mapped.astype(jnp.float32) - lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.mean(error * error, axis=-1)


def router_match(student: Float[Array, "N E"], teacher: Float[Array, "N E"]) -> Float[Array, "N"]:
    """KL(softmax(teacher) ‖ softmax(student)) of router logits. UserError: different E."""
    require(
        student.shape == teacher.shape,
        f"routers of {student.shape[-1]} and {teacher.shape[-1]} experts cannot be compared",
    )
    log_q = jax.nn.log_softmax(student.astype(jnp.float32))
    log_p = jax.nn.log_softmax(lax.stop_gradient(teacher).astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
