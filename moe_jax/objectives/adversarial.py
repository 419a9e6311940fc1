"""Objectives with an adversary, and their controls.

step = make_step(config, perturbed_objective(settings, teacher))  # step(state, batch, teacher's)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from moe_jax.adversarial import controls, perturb
from moe_jax.base.initial import named_key
from moe_jax.config import ModelConfig, require
from moe_jax.config.checks import known_choices
from moe_jax.distill import losses as distill
from moe_jax.distill.chunked import LazyLogits, VocabularyChunks, divergence, vocabulary_chunks
from moe_jax.distill.divergences import Divergence
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import Batch, Loss, Objective, Reading, forward, whole_batch
from moe_jax.objectives.distillation import States

WEIGHT = "weight"
"""Key of a batch: float32[B], the weight of each sequence."""


@dataclass(frozen=True)
class PerturbConfig:
    """The loss that is added to plain distillation from an online teacher."""

    kind: Literal["none", "virtual", "random", "swaps", "random_swaps"] = "virtual"
    """virtual and random shift the embeddings, in the worst or in a random direction. The KL from
    the unshifted student is added. swaps and random_swaps exchange tokens for the worst or for
    random ones, and match the teacher on this text, too (MATE-KD, arXiv:2105.05912, with swaps to
    first order in place of its generator)."""
    alpha: float = 1.0
    """Share of the teacher. The rest is cross-entropy with the text."""
    weight: float = 1.0
    """Weight of the added loss."""
    size: float = 0.1
    """Norm of the shift as a fraction of the norm of the sequence's embeddings."""
    steps: int = 1
    """Power iterations."""
    swaps: int = 4
    """Tokens swapped in a sequence."""
    swap_vocabulary: int = 128
    """Tokens that may be swapped in: ids below this (128: ASCII, where tokens are bytes)."""

    def __post_init__(self) -> None:
        owner = "perturb"
        known_choices(owner, self)
        require(0 <= self.alpha <= 1, f"{owner}.alpha is {self.alpha}: it must be in [0, 1]")
        for name in ("weight", "size", "steps", "swaps"):
            value = getattr(self, name)
            require(value > 0, f"{owner}.{name} is {value}: it must be positive")
        require(
            self.swap_vocabulary > 1,
            f"{owner}.swap_vocabulary is {self.swap_vocabulary}: a swap needs another token",
        )


@dataclass(frozen=True)
class Student:
    """A student's reading of a part with everything that a loss a position needs. N = B·L."""

    reading: Reading
    logits: LazyLogits
    targets: Int[Array, "N"]
    valid: Bool[Array, "N"]
    chunks: VocabularyChunks

    def nats(self) -> Float[Array, "N"]:
        """The cross-entropy of each position, at temperature 1."""
        return distill.cross_entropy(self.logits, self.targets, self.chunks)

    def total(self, values: Float[Array, "N"]) -> Float[Array, ""]:
        """The sum over valid positions, divided by their number in the whole batch."""
        return distill.total(values, self.valid, self.reading.normaliser)

    def loss(self, minimised: Float[Array, ""]) -> Loss:
        """`minimised` as the loss. The cross-entropy is reported beside it."""
        return Loss(self.total(self.nats()), minimised)


def student_of(reading: Reading, temperature: float = 1.0) -> Student:
    """The reading with its targets and the chunks of its vocabulary."""
    logits = reading.logits
    targets, valid = reading.targets()
    chunks = vocabulary_chunks([logits], temperature=temperature)
    return Student(reading, logits, targets, valid, chunks)


def weighted(reading: Reading) -> Loss:
    """Cross-entropy whose sequences weigh batch[WEIGHT] (adversarial.reweight.item_weights).

    Multi-token prediction, where the model has it, weighs all sequences alike.
    """
    student = student_of(reading)
    weights = jnp.repeat(reading.batch[WEIGHT], reading.length)
    return student.loss(student.total(weights * student.nats()))


def smoothed_objective(epsilon: float) -> Objective:
    """Label smoothing (adversarial.controls). UserError: epsilon outside [0, 1)."""
    require(0 <= epsilon < 1, f"label smoothing epsilon is {epsilon}: it must be in [0, 1)")

    def objective(reading: Reading) -> Loss:
        student = student_of(reading)
        values = controls.label_smoothing(student.logits, student.targets, student.chunks, epsilon)
        return student.loss(student.total(values))

    return objective


def guess_objective(alpha: float, teacher: ModelConfig) -> Objective:
    """(1 - alpha) · CE + alpha · cross-entropy with the teacher's best guess and a uniform rest.

    A step takes the teacher's States as its third argument (adversarial.controls).
    """
    graph = graph_of(teacher)

    def objective(reading: Reading, states: States) -> Loss:
        student = student_of(reading)
        outputs = reading.read_by(nnx.merge(graph, *states))
        values = (1 - alpha) * student.nats()
        values += alpha * controls.guess_and_uniform(student.logits, outputs, student.chunks)
        return student.loss(student.total(values))

    return objective


def perturbed_objective(settings: PerturbConfig, teacher: ModelConfig) -> Objective:
    """Distillation with the loss that `settings` adds.

    A step takes the teacher's States as its third argument.
    """
    graph = graph_of(teacher)

    def objective(reading: Reading, states: States) -> Loss:
        assert reading.part.key is not None, "a perturbation draws"
        student = student_of(reading)
        frozen = nnx.merge(graph, *states)

        def from_teacher(logits: LazyLogits, tokens: Array) -> Array:
            outputs = [reading.read_by(frozen, tokens)]
            return student.total(divergence(logits, outputs, student.chunks, Divergence()))

        loss = settings.alpha * from_teacher(student.logits, reading.tokens)
        loss += (1 - settings.alpha) * student.total(student.nats())
        if settings.kind != "none":
            added = _shifted if settings.kind in ("virtual", "random") else _swapped
            # A key of its own: dropout's draws are those of plain distillation with the same seed.
            key = named_key(reading.part.key, "perturbation")
            loss += settings.weight * added(settings, student, key, from_teacher)
        return student.loss(loss)

    return objective


def _without_gradient(model: Transformer) -> Transformer:
    """The same model as a constant.

    A perturbation comes from a derivative of the model. Without the stop, the training step would
    differentiate that derivative again.
    """
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.lax.stop_gradient(state))


def _shifted(
    settings: PerturbConfig,
    student: Student,
    key: Array,
    from_teacher: Callable[[LazyLogits, Array], Array],
) -> Array:
    """KL(q(x) ‖ q(x + shift)), with q(x) without dropout and without gradient.

    `from_teacher` is not used: the loss compares the student with itself.
    """
    reading = student.reading
    fixed = _without_gradient(reading.model)
    clean = reading.read_by(fixed)
    # Padding is not part of the text: it has no share in the radius, and is not moved.
    text = reading.segments != 0
    embedded = jnp.where(text[..., None], fixed.embed(reading.tokens), 0)

    def distance(model: Transformer, shift: Array) -> Array:
        moved = reading.read_by(model, shift=shift)
        return student.total(divergence(moved, [clean], student.chunks, Divergence()))

    radius = perturb.radius_of(embedded, settings.size)
    if settings.kind == "random":
        return distance(reading.model, perturb.random_shift(key, embedded, radius, text))
    worst = partial(distance, fixed)
    shift = perturb.adversarial_shift(
        worst, key, embedded, radius, steps=settings.steps, counted=text
    )
    return distance(reading.model, shift)


def _swapped(
    settings: PerturbConfig,
    student: Student,
    key: Array,
    from_teacher: Callable[[LazyLogits, Array], Array],
) -> Array:
    """The divergence from the teacher, with both models reading the text with swapped tokens."""
    reading = student.reading
    tokens = reading.tokens
    segments = reading.segments
    if settings.kind == "random_swaps":
        other = perturb.random_swaps(
            key, tokens, settings.swaps, settings.swap_vocabulary, segments
        )
    else:
        fixed = _without_gradient(reading.model)

        def distance(shift: Array) -> Array:
            return from_teacher(reading.read_by(fixed, shift=shift), tokens)

        # With respect to a shift of 0: the gradient at the embeddings themselves.
        gradient = jax.grad(distance)(jnp.zeros_like(fixed.embed(tokens)))
        table = fixed.embedding[...]
        other = perturb.adversarial_swaps(
            gradient, table, tokens, settings.swaps, settings.swap_vocabulary, segments
        )
    return from_teacher(reading.read_by(reading.model, other), other)


def sequence_nats(model: Transformer, batch: Batch, length: int) -> Float[Array, "B"]:
    """Mean -log q of each sequence's targets, by which adversarial.reweight selects sequences."""
    reading = forward(model, whole_batch(batch, length, 0, None), length)
    student = student_of(reading)
    values = student.nats().reshape(-1, length)
    valid = student.valid.reshape(-1, length)
    return jnp.where(valid, values, 0).sum(-1) / jnp.maximum(valid.sum(-1), 1)
