"""Controls for distillation: soft targets without the teacher's knowledge.

A student may gain from a teacher merely because soft targets regularise. Two controls are as soft.
Label smoothing has no teacher, and `guess_and_uniform` keeps only the teacher's best guess and its
confidence (arXiv:1805.04770, §3.2, and 1909.11723).
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.distill.chunked import (
    MASKED_LOGIT,
    LazyLogits,
    VocabularyChunks,
    log_normaliser,
    scan_chunks,
)
from moe_jax.distill.losses import cross_entropy, token_logit


def uniform_cross_entropy(student: LazyLogits, columns: VocabularyChunks) -> Float[Array, "N"]:
    """-1/V sum_v log q_v = log Z - hidden · (mean row of the table)."""
    # The mean over v of hidden · table[v] is hidden · mean(table): no N x V logits are needed.
    row = student.table[: columns.vocabulary].astype(jnp.float32).mean(axis=0)
    mean = student.hidden.astype(jnp.float32) @ row / columns.temperature
    return log_normaliser(student, columns) - mean


def label_smoothing(
    student: LazyLogits, targets: Int[Array, "N"], columns: VocabularyChunks, epsilon: float
) -> Float[Array, "N"]:
    """(1 - epsilon) · CE + epsilon · uniform cross-entropy (arXiv:1512.00567, §7)."""
    sharp = cross_entropy(student, targets, columns)
    return (1 - epsilon) * sharp + epsilon * uniform_cross_entropy(student, columns)


def best_guess(
    teacher: LazyLogits, columns: VocabularyChunks
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """The teacher's most likely token and its probability. No gradient passes through."""

    def better(best: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        token, highest = best
        logits = columns.logits(teacher, index)
        top = logits.max(-1)
        # Only a strictly larger logit wins, so that of equal ones the first token is taken, as by
        # argmax over the whole vocabulary.
        token = jnp.where(top > highest, columns.begin(index) + logits.argmax(-1), token)
        return token, jnp.maximum(top, highest)

    rows = teacher.hidden.shape[0]
    start = (jnp.zeros(rows, jnp.int32), jnp.full(rows, MASKED_LOGIT, jnp.float32))
    token, top = scan_chunks(columns, better, start)
    return token, lax.stop_gradient(jnp.exp(top - log_normaliser(teacher, columns)))


def guess_and_uniform(
    student: LazyLogits, teacher: LazyLogits, columns: VocabularyChunks
) -> Float[Array, "N"]:
    """Cross-entropy with p' = p_max on the teacher's best token, (1 - p_max)/(V - 1) elsewhere."""
    token, p_max = best_guess(teacher, columns)
    log_q = token_logit(student, token) / columns.temperature - log_normaliser(student, columns)
    # The sum of log q over all tokens, without that of the best one.
    others = -columns.vocabulary * uniform_cross_entropy(student, columns) - log_q
    return -(p_max * log_q + (1 - p_max) / (columns.vocabulary - 1) * others)
