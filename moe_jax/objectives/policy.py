"""Generative adversarial distillation: the policy's objective, and the discriminator's step.

step = make_step(config, policy_objective(settings, start))    # step(state, batch, start's States)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from moe_jax.adversarial import generative
from moe_jax.config import ModelConfig, require
from moe_jax.distill import losses as distill
from moe_jax.distill.chunked import divergence
from moe_jax.distill.divergences import Divergence
from moe_jax.model.abstract import graph_of
from moe_jax.objectives.adversarial import student_of
from moe_jax.objectives.base import OWN, Loss, Objective, Reading
from moe_jax.objectives.distillation import States

ADVANTAGE = "advantage"
"""Key of a batch: float32[B], the reward of each sequence less its group's mean."""


@dataclass(frozen=True)
class GenerativeConfig:
    """Generative adversarial distillation. The defaults are the paper's (arXiv:2511.10643)."""

    group: int = 8
    """Continuations of one prompt (n)."""
    anchor: float = 1e-3
    """Weight of KL(student ‖ starting student) on the written tokens."""
    clip: float = 0.2
    """Largest change of a token's probability ratio that is rewarded. In the first update on new
    samples the ratio is 1, so it acts from the second update on."""
    temperature: float = 0.8
    """Temperature at which the student samples. Its log-probabilities are taken at the same one."""

    def __post_init__(self) -> None:
        owner = "generative"
        require(self.group >= 2, f"{owner}.group is {self.group}: a mean needs at least 2")
        require(self.anchor >= 0, f"{owner}.anchor is {self.anchor}: it must not be negative")
        for name in ("clip", "temperature"):
            value = getattr(self, name)
            require(value > 0, f"{owner}.{name} is {value}: it must be positive")


def policy_objective(settings: GenerativeConfig, start: ModelConfig) -> Objective:
    """Policy gradient on batch[ADVANTAGE] and the anchor, over the tokens that batch[OWN] marks.

    Both are means over sequences of means over written tokens. A token beyond the end of its
    document (another segment, or 0) is no target. A step takes the starting student's States as its
    third argument. The batch's "old_log_q", float32[B, L], are the log-probabilities at sampling.
    Without them, the samples count as drawn from the current student.
    """
    graph = graph_of(start)

    def objective(reading: Reading, states: States) -> Loss:
        student = student_of(reading, settings.temperature)
        own = reading.batch[OWN][:, : reading.length] & student.valid.reshape(-1, reading.length)
        # The losses of the micro-batches add up: each is its share of the mean over all sequences.
        share = len(own) / reading.part.rows
        log_q = distill.token_logit(student.logits, student.targets) / settings.temperature
        log_q -= distill.log_normaliser(student.logits, student.chunks)
        log_q = log_q.reshape(own.shape)
        old = reading.batch.get("old_log_q", jax.lax.stop_gradient(log_q))
        loss = generative.policy_loss(log_q, old, reading.batch[ADVANTAGE], own, settings.clip)
        # An anchor of 0 needs no second model.
        if settings.anchor:
            first = [reading.read_by(nnx.merge(graph, *states))]
            values = divergence(student.logits, first, student.chunks, Divergence("reverse"))
            means = generative.sequence_means(values.reshape(own.shape), own)
            loss += settings.anchor * means.mean()
        return student.loss(share * loss)

    return objective


class DiscriminatorState(NamedTuple):
    """Everything that an update of the discriminator changes."""

    parameters: Any
    router: Any
    optimizer: optax.OptState


def make_discriminator_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[DiscriminatorState, Array, Array]]:
    """(state, teacher's text, student's text) -> (state, loss, accuracy before the update).

    The texts are int32[N, L] without padding. Equal rows are a pair with the same prompt.
    """

    def step(
        state: DiscriminatorState, teacher: Array, student: Array
    ) -> tuple[DiscriminatorState, Array, Array]:
        def loss(parameters: Any) -> tuple[Array, Array]:
            judge = nnx.merge(graph, parameters, state.router)
            scores = judge(jnp.concatenate([teacher, student]))  # one pass over both, [2N]
            real, own = jnp.split(scores, 2)
            return generative.discriminator_loss(real, own), generative.accuracy(real, own)

        # Parameters alone: a discriminator has no balance losses and no update of its router bias.
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
        updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return DiscriminatorState(parameters, state.router, moments), value, right

    return step
