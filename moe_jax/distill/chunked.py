"""Divergences of whole distributions, some columns of the vocabulary at a time.

The logits of N positions over V tokens are the largest array of a language model, and distillation
would need several of it. Here they exist for `chunk` tokens at a time: one pass finds the
normalisers, one sums the divergence, and the backward pass makes each chunk once more. The price is
three products with each output table instead of one.
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

CHUNK = 4096
"""Columns at a time: wide enough for fast products, and a tenth of a large vocabulary."""
NOTHING = -1e30
"""Logit of a column that does not count: exp gives 0, and differences stay finite."""


class Readout(NamedTuple):
    """Logits that are not there yet: hidden · tableᵀ."""

    hidden: Float[Array, "N D"]
    """Normalised output of the last block."""
    table: Float[Array, "V D"]
    """Output head."""


class Columns(NamedTuple):
    """How the vocabulary is walked."""

    vocabulary: int
    """Tokens that count; rows from here on are padding."""
    chunk: int
    temperature: float

    def count(self) -> int:
        return -(-self.vocabulary // self.chunk)

    def begin(self, index: Array) -> Array:
        """First column of a chunk; the last chunk moves back so that it is whole."""
        return jnp.minimum(index * self.chunk, self.vocabulary - self.chunk)

    def logits(self, of: Readout, index: Array) -> Float[Array, "N C"]:
        """A chunk's logits / temperature in float32, NOTHING where another chunk has the column."""
        begin = self.begin(index)
        rows = lax.dynamic_slice_in_dim(of.table, begin, self.chunk)
        rows = rows.astype(of.hidden.dtype)
        product = jnp.einsum("nd,vd->nv", of.hidden, rows, preferred_element_type=jnp.float32)
        fresh = begin + jnp.arange(self.chunk) >= index * self.chunk
        return jnp.where(fresh, product / self.temperature, NOTHING)


def make_columns(
    readouts: Sequence[Readout],
    vocabulary: int | None = None,
    chunk: int = CHUNK,
    temperature: float = 1.0,
) -> Columns:
    """The walk over the common vocabulary. UserError: tables of different heights without
    `vocabulary`, a `vocabulary` that one of them does not have, or a useless setting."""
    heights = [of.table.shape[0] for of in readouts]
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
    require(chunk > 0, f"chunk is {chunk}: it must be positive")
    return Columns(vocabulary, min(chunk, vocabulary), float(temperature))


def fold(columns: Columns, body: Callable[[Any, Array], Any], start: Any) -> Any:
    """body(carry, chunk index) over all chunks; differentiating recomputes each chunk."""
    step = jax.checkpoint(lambda carry, index: (body(carry, index), None), prevent_cse=False)
    return lax.scan(step, start, jnp.arange(columns.count()))[0]


def log_normaliser(
    of: Readout, columns: Columns, without: Int[Array, "N K"] | None = None
) -> Float[Array, "N"]:
    """logsumexp of the logits over the vocabulary, less K tokens a position if `without` names
    them; differentiable."""

    def add(total: Array, index: Array) -> Array:
        logits = columns.logits(of, index)
        if without is not None:
            place = without - columns.begin(index)
            place = jnp.where(place < 0, columns.chunk, place)  # not here: dropped
            rows = jnp.arange(len(logits))[:, None]
            logits = logits.at[rows, place].set(NOTHING, mode="drop")
        return jnp.logaddexp(total, jax.nn.logsumexp(logits, axis=-1))

    return fold(columns, add, jnp.full(of.hidden.shape[0], NOTHING, jnp.float32))


def divergence(
    student: Readout,
    teachers: Sequence[Readout],
    columns: Columns,
    kind: Divergence,
    weights: Sequence[float] | None = None,
) -> Float[Array, "N"]:
    """Each position's divergence of the student from the (mixture of) teacher distributions.

    p = sum_i weights_i softmax(teacher_i / temperature), q = softmax(student / temperature). No
    gradient reaches the teachers. UserError: no teacher, or weights that do not sum to 1.
    """
    weights = weights or [1 / max(len(teachers), 1)] * len(teachers)
    require(len(teachers) == len(weights) > 0, "give one weight to each of at least one teacher")
    fair = all(w > 0 for w in weights) and abs(sum(weights) - 1) < 1e-6
    require(fair, f"teacher weights {weights} must be positive and sum to 1")
    return _divergence(columns, kind.checked(), tuple(weights), student, tuple(teachers))


class _Kept(NamedTuple):
    student: Readout
    teachers: tuple[Readout, ...]
    log_z: Array
    teacher_log_z: list[Array]
    slope: Array
    """sum over the vocabulary of d term / d log q."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _divergence(
    columns: Columns,
    kind: Divergence,
    weights: tuple[float, ...],
    student: Readout,
    teachers: tuple[Readout, ...],
) -> Array:
    return _forward(columns, kind, weights, student, teachers)[0]


def _forward(
    columns: Columns,
    kind: Divergence,
    weights: tuple[float, ...],
    student: Readout,
    teachers: tuple[Readout, ...],
) -> tuple[Array, _Kept]:
    log_z = log_normaliser(student, columns)
    teacher_log_z = [log_normaliser(teacher, columns) for teacher in teachers]
    zeros = jnp.zeros_like(log_z)
    kept = _Kept(student, teachers, log_z, teacher_log_z, zeros)

    def add(sums: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        value, slope, _ = _term(columns, kind, weights, kept, index)
        return sums[0] + value.sum(axis=-1), sums[1] + slope.sum(axis=-1)

    total, slope = fold(columns, add, (zeros, zeros))
    return total, kept._replace(slope=slope)


def _term(
    columns: Columns, kind: Divergence, weights: tuple[float, ...], kept: _Kept, index: Array
) -> tuple[Array, Array, Array]:
    """A chunk's terms, their derivatives in log q, and log q."""
    log_q = columns.logits(kept.student, index) - kept.log_z[:, None]
    logs = [
        jnp.log(weight) + columns.logits(teacher, index) - log_z[:, None]
        for weight, teacher, log_z in zip(weights, kept.teachers, kept.teacher_log_z, strict=True)
    ]
    log_p = jax.nn.logsumexp(jnp.stack(logs), axis=0)
    value, pull = jax.vjp(lambda log_q: kind.term(log_p, log_q), log_q)
    return value, pull(jnp.ones_like(value))[0], log_q


def _backward(
    columns: Columns, kind: Divergence, weights: tuple[float, ...], kept: _Kept, upstream: Array
) -> tuple[Readout, None]:
    hidden, table = kept.student
    scale = upstream / columns.temperature

    def add(sums: tuple[Array, Array], index: Array) -> tuple[Array, Array]:
        _, slope, log_q = _term(columns, kind, weights, kept, index)
        logits = scale[:, None] * (slope - jnp.exp(log_q) * kept.slope[:, None])
        begin = columns.begin(index)
        rows = lax.dynamic_slice_in_dim(table, begin, columns.chunk).astype(jnp.float32)
        to_hidden = sums[0] + logits @ rows
        to_rows = lax.dynamic_slice_in_dim(sums[1], begin, columns.chunk)
        to_rows += jnp.einsum("nv,nd->vd", logits, hidden.astype(jnp.float32))
        return to_hidden, lax.dynamic_update_slice_in_dim(sums[1], to_rows, begin, axis=0)

    start = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32))
    to_hidden, to_table = fold(columns, add, start)
    return Readout(to_hidden.astype(hidden.dtype), to_table.astype(table.dtype)), None


_divergence.defvjp(_forward, _backward)
