"""Divergences of whole distributions, computed for one chunk of the vocabulary at a time.

The logits of N positions over V tokens are the largest array of a language model, and distillation
would need several of them. Here they exist for one chunk of tokens at a time. One pass computes the
normalisers, one sums the divergence, and the backward pass computes each chunk's logits once more.
The price is three products with each output table instead of one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.config import require
from moe_jax.distill.divergences import Divergence
from moe_jax.parallel.mesh import carry_like

CHUNK_SIZE = 4096
"""Tokens at a time: wide enough for fast products, and a tenth of a large vocabulary."""
MASKED_LOGIT = -1e30
"""Logit of a token that does not count. exp gives 0, and, unlike with -inf, the difference of two
is no NaN."""


class LazyLogits(NamedTuple):
    """Logits in factors, hidden · tableᵀ, which are multiplied out chunk by chunk."""

    hidden: Float[Array, "N D"]
    """Normalised output of the last block."""
    table: Float[Array, "V D"]
    """Output head."""


class VocabularyChunks(NamedTuple):
    """How the vocabulary is split. Temperature is here, because it applies to every logit."""

    vocabulary: int
    """Tokens that count. The table's rows beyond them are padding."""
    size: int
    temperature: float

    def count(self) -> int:
        return -(-self.vocabulary // self.size)

    def begin(self, index: Array) -> Array:
        """First token of a chunk."""
        # The last chunk begins early enough to be whole, so that all have one shape. The tokens
        # that it shares with the chunk before are masked in `logits`.
        return jnp.minimum(index * self.size, self.vocabulary - self.size)

    def logits(self, of: LazyLogits, index: Array) -> Float[Array, "N columns"]:
        """A chunk's logits / temperature in float32. Tokens of another chunk are MASKED_LOGIT."""
        begin = self.begin(index)
        rows = lax.dynamic_slice_in_dim(of.table, begin, self.size)
        rows = rows.astype(of.hidden.dtype)
        product = jnp.einsum("nd,vd->nv", of.hidden, rows, preferred_element_type=jnp.float32)
        own = begin + jnp.arange(self.size) >= index * self.size
        return jnp.where(own, product / self.temperature, MASKED_LOGIT)


def vocabulary_chunks(
    models: Sequence[LazyLogits],
    vocabulary: int | None = None,
    size: int = CHUNK_SIZE,
    temperature: float = 1.0,
) -> VocabularyChunks:
    """Chunks of the vocabulary that all models share.

    UserError: tables of different heights without `vocabulary`, a `vocabulary` that exceeds one of
    them, or a setting that is not positive.
    """
    heights = [of.table.shape[0] for of in models]
    require(
        vocabulary is not None or len(set(heights)) == 1,
        f"output tables have {heights} rows: pass vocabulary=N if the first N tokens are the same, "
        "else distil through text: train on what the teacher writes",
    )
    vocabulary = vocabulary or heights[0]
    require(
        vocabulary <= min(heights), f"vocabulary={vocabulary} exceeds a table of {min(heights)}"
    )
    require(temperature > 0, f"temperature is {temperature}: it must be positive")
    require(size > 0, f"chunk is {size}: it must be positive")
    return VocabularyChunks(vocabulary, min(size, vocabulary), float(temperature))


def scan_chunks(chunks: VocabularyChunks, body: Callable[[Any, Array], Any], start: Any) -> Any:
    """body(carry, chunk index) over all chunks. Differentiating it recomputes each chunk."""
    # prevent_cse keeps XLA from merging the recomputation with the forward pass. JAX's
    # documentation calls it unnecessary inside of a scan, where its barriers only hinder fusion.
    step = jax.checkpoint(lambda carry, index: (body(carry, index), None), prevent_cse=False)
    result = jax.tree.leaves(jax.eval_shape(body, start, jnp.int32(0)))
    return lax.scan(step, carry_like(start, *result), jnp.arange(chunks.count()))[0]


def log_normaliser(
    of: LazyLogits, chunks: VocabularyChunks, without: Int[Array, "N K"] | None = None
) -> Float[Array, "N"]:
    """logsumexp over the vocabulary of logits / temperature; differentiable.

    `without` names K tokens at each position that are left out of the sum.
    """

    def add(total: Array, index: Array) -> Array:
        logits = chunks.logits(of, index)
        if without is not None:
            column = without - chunks.begin(index)
            # A negative index would count from the end. One beyond the end is dropped.
            column = jnp.where(column < 0, chunks.size, column)
            rows = jnp.arange(len(logits))[:, None]
            logits = logits.at[rows, column].set(MASKED_LOGIT, mode="drop")
        return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))

    return scan_chunks(chunks, add, jnp.full(of.hidden.shape[0], MASKED_LOGIT, jnp.float32))


def divergence(
    student: LazyLogits,
    teachers: Sequence[LazyLogits],
    chunks: VocabularyChunks,
    kind: Divergence,
    weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """Each position's divergence of the student from the (mixture of) teacher distributions.

    p = sum_i weights_i softmax(teacher_i / temperature), q = softmax(student / temperature). No
    gradient reaches the teachers. UserError: no teacher, or weights that do not sum to 1.
    """
    weights = weights or [1 / max(len(teachers), 1)] * len(teachers)
    require(len(teachers) == len(weights) > 0, "give one weight to each of at least one teacher")
    valid = all(w > 0 for w in weights) and abs(sum(weights) - 1) < 1e-6
    require(valid, f"teacher weights {weights} must be positive and sum to 1")
    return _divergence(chunks, kind.checked(), tuple(weights), student, tuple(teachers))


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass: O(N) numbers beside the inputs."""

    student: LazyLogits
    teachers: tuple[LazyLogits, ...]
    log_z: Float[Array, "N"]
    teacher_log_z: list[Float[Array, "N"]]
    slope: Float[Array, "N"]
    """Sum over the vocabulary of d term / d log q."""


# The derivative is written by hand. JAX's own would go back through the normaliser's scan and then
# through the sum's: two passes over the vocabulary instead of one.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _divergence(
    chunks: VocabularyChunks,
    kind: Divergence,
    weights: tuple[float, ...],
    student: LazyLogits,
    teachers: tuple[LazyLogits, ...],
) -> Array:
    return _forward(chunks, kind, weights, student, teachers)[0]


def _forward(
    chunks: VocabularyChunks,
    kind: Divergence,
    weights: tuple[float, ...],
    student: LazyLogits,
    teachers: tuple[LazyLogits, ...],
) -> tuple[Array, _Residuals]:
    log_z = log_normaliser(student, chunks)
    teacher_log_z = [log_normaliser(teacher, chunks) for teacher in teachers]
    zeros = jnp.zeros_like(log_z)
    residuals = _Residuals(student, teachers, log_z, teacher_log_z, zeros)

    def add(sums: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        value, slope, _ = _terms(chunks, kind, weights, residuals, index)
        return sums[0] + value.sum(axis=-1), sums[1] + slope.sum(axis=-1)

    total, slope = scan_chunks(chunks, add, (zeros, zeros))
    return total, residuals._replace(slope=slope)


def _terms(
    chunks: VocabularyChunks,
    kind: Divergence,
    weights: tuple[float, ...],
    of: _Residuals,
    index: Array,
) -> tuple[Array, Array, Array]:
    """A chunk's terms, their derivatives in log q, and log q: [N, columns] each."""
    log_q = chunks.logits(of.student, index) - of.log_z[:, None]
    logs = [
        jnp.log(weight) + chunks.logits(teacher, index) - log_z[:, None]
        for weight, teacher, log_z in zip(weights, of.teachers, of.teacher_log_z, strict=True)
    ]
    log_p = jax.nn.logsumexp(jnp.stack(logs), axis=0)
    value, pull = jax.vjp(lambda log_q: kind.term(log_p, log_q), log_q)
    # Each term depends on its own log q only, so one pull of ones gives all derivatives.
    return value, pull(jnp.ones_like(value))[0], log_q


def _backward(
    chunks: VocabularyChunks,
    kind: Divergence,
    weights: tuple[float, ...],
    residuals: _Residuals,
    upstream: Float[Array, "N"],
) -> tuple[LazyLogits, None]:
    """d/dlogits = upstream / temperature · (w - q · sum(w)), w = d term / d log q."""
    hidden, table = residuals.student
    scale = upstream / chunks.temperature

    def add(sums: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        _, slope, log_q = _terms(chunks, kind, weights, residuals, index)
        logits = scale[:, None] * (slope - jnp.exp(log_q) * residuals.slope[:, None])
        begin = chunks.begin(index)
        rows = lax.dynamic_slice_in_dim(table, begin, chunks.size).astype(jnp.float32)
        to_hidden = sums[0] + logits @ rows
        # Added to the rows, not written: the last chunk overlaps with the one before.
        to_rows = lax.dynamic_slice_in_dim(sums[1], begin, chunks.size)
        to_rows += jnp.einsum("nv,nd->vd", logits, hidden.astype(jnp.float32))
        return to_hidden, lax.dynamic_update_slice_in_dim(sums[1], to_rows, begin, axis=0)

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32))
    to_hidden, to_table = scan_chunks(chunks, add, start)
    # None: no gradient for the teachers.
    return LazyLogits(to_hidden.astype(hidden.dtype), to_table.astype(table.dtype)), None


_divergence.defvjp(_forward, _backward)
