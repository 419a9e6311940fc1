"""What a student is trained on: mixtures of a divergence from its teacher and cross-entropy.

Every function gives one value a position, in nats; `total` turns them into a loss. The teacher's
position t and the student's position t have read the same tokens, so they are compared without a
shift; only cross-entropy looks at the next token.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.config import require
from moe_jax.distill.chunked import Columns, Readout, divergence, log_normaliser
from moe_jax.distill.divergences import Divergence


def total(
    values: Float[Array, "N"], mask: Bool[Array, "N"], normaliser: Float[Array, ""] | float
) -> Float[Array, ""]:
    """sum of the values where the mask holds / normaliser.

    The normaliser counts the valid positions of the *whole* batch, over all micro-batches and
    devices, so that parts add up; a mean over each part would not.
    """
    return jnp.sum(jnp.where(mask, values, 0.0)) / normaliser


def token_logit(of: Readout, tokens: Int[Array, "N"]) -> Float[Array, "N"]:
    """One logit a position, without its neighbours."""
    rows = jnp.take(of.table, tokens, axis=0, mode="clip").astype(of.hidden.dtype)
    return jnp.einsum("nd,nd->n", of.hidden, rows, preferred_element_type=jnp.float32)


def cross_entropy(
    student: Readout,
    targets: Int[Array, "N"],
    columns: Columns,
    log_z: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """-log softmax(student)[target], at temperature 1; `log_z`: its log_normaliser, if it is known.

    On text that the teacher wrote, it is sequence-level distillation (arXiv:1606.07947, eq. 6). On
    the student's own text it would only confirm the student: use a divergence there.
    """
    if log_z is None:
        log_z = log_normaliser(student, columns._replace(temperature=1.0))
    return log_z - token_logit(student, targets)


def distillation(
    student: Readout,
    teachers: Sequence[Readout],
    targets: Int[Array, "N"],
    columns: Columns,
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
        values += (1 - alpha) * cross_entropy(student, targets, columns)
    if alpha > 0:
        apart = divergence(student, teachers, columns, kind, weights)
        values += alpha * columns.temperature**2 * apart
    return values


def sampled(
    student: Readout,
    samples: Int[Array, "N K"],
    columns: Columns,
    log_z: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """-1/K · sum_k log q(v_k) for v_k drawn from the teacher (arXiv:2503.16870, §4).

    Its expectation is KL(p ‖ q) + H(p), and its gradient's is exactly q - p, whatever K. Samples
    must have been drawn at the temperature of `columns`. `log_z`: log_normaliser(student, columns),
    if it is known: it is nearly all of the cost.
    """
    if log_z is None:
        log_z = log_normaliser(student, columns)
    return jnp.mean(log_z[:, None] - _picked(student, samples, columns), axis=-1)


def top_k_tail(
    student: Readout,
    tokens: Int[Array, "N K"],
    log_p: Float[Array, "N K"],
    columns: Columns,
) -> Float[Array, "N"]:
    """sum_k p_k log(p_k/q_k) + p_tail log(p_tail/q_tail) over the teacher's K best tokens.

    Both are probabilities over the whole vocabulary, and all other tokens are one event. It is
    KL(p ‖ q) after merging the tail, hence at most KL(p ‖ q) and 0 if p = q. (Renormalised over
    the K instead, the student may put any mass on the other tokens for free.)
    """
    log_p = log_p.astype(jnp.float32)
    picked = _picked(student, tokens, columns)
    # The tail is summed by itself: as 1 - sum q_k it would vanish in float32, its gradient with it.
    tail = log_normaliser(student, columns, without=tokens)
    log_z = jnp.logaddexp(jax.nn.logsumexp(picked, axis=-1), tail)
    inside = jnp.sum(jnp.exp(log_p) * (log_p - picked + log_z[:, None]), axis=-1)
    p_tail = jnp.maximum(1 - jnp.exp(log_p).sum(axis=-1), 0.0)
    return inside + p_tail * (jnp.log(jnp.maximum(p_tail, 1e-9)) - tail + log_z)


def _picked(of: Readout, tokens: Int[Array, "N K"], columns: Columns) -> Float[Array, "N K"]:
    """logits / temperature of K tokens a position; rows of the table are gathered for one k at a
    time, because all of them would be [N, K, D]."""

    @jax.checkpoint
    def one(tokens: Array) -> Array:
        return token_logit(of, tokens) / columns.temperature

    return lax.map(one, tokens.T).T


def hidden_match(
    student: Float[Array, "N D"],
    teacher: Float[Array, "N D2"],
    projection: Float[Array, "D D2"] | None = None,
) -> Float[Array, "N"]:
    """mean over D2 of (student · projection - teacher)² (FitNets, arXiv:1412.6550, eq. 3).

    UserError: the widths differ and no projection is given.
    """
    require(
        projection is not None or student.shape[-1] == teacher.shape[-1],
        f"hidden widths {student.shape[-1]} and {teacher.shape[-1]} differ: give a projection",
    )
    mapped = student if projection is None else student @ projection
    apart = mapped.astype(jnp.float32) - lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.mean(apart * apart, axis=-1)


def router_match(student: Float[Array, "N E"], teacher: Float[Array, "N E"]) -> Float[Array, "N"]:
    """KL(softmax(teacher) ‖ softmax(student)) of router logits. UserError: different E."""
    require(
        student.shape == teacher.shape,
        f"routers of {student.shape[-1]} and {teacher.shape[-1]} experts cannot be compared",
    )
    log_q = jax.nn.log_softmax(student.astype(jnp.float32))
    log_p = jax.nn.log_softmax(lax.stop_gradient(teacher).astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
