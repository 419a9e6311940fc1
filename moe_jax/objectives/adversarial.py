"""Training with an adversary or its control: objectives for make_step, the discriminator's step.

step = make_step(config, perturbed_objective(settings, teacher))  # step(state, batch, teacher's)
step = make_step(config, policy_objective(settings))              # step(state, batch, start's)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from moe_jax.adversarial import controls, generative, perturb
from moe_jax.config import ModelConfig, require
from moe_jax.data.batches import shifted_targets
from moe_jax.distill import losses as distill
from moe_jax.distill.chunked import LazyLogits, VocabularyChunks, divergence, vocabulary_chunks
from moe_jax.distill.divergences import Divergence
from moe_jax.distill.teacher import lazy_forward, lazy_logits, split_model
from moe_jax.model.attention import document_context
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterStats
from moe_jax.objectives.distillation import OWN
from moe_jax.objectives.next_token import Batch, Losses
from moe_jax.train.step import Objective, TrainState

WEIGHT = "weight"
"""Key of a batch: float32[B], the weight of each sequence."""
ADVANTAGE = "advantage"
"""Key of a batch: float32[B], the reward of each sequence less its group's mean."""
State = tuple[Any, Any]
"""(parameters, router) of a model."""


@dataclass(frozen=True)
class PerturbConfig:
    """What is added to plain distillation from an online teacher."""

    kind: Literal["none", "virtual", "random", "swaps", "random_swaps"] = "virtual"
    """A shift of the embeddings in the worst or in a random direction, whose KL from the unshifted
    student is added; or tokens swapped for the worst or for random ones, on which the teacher is
    matched too (MATE-KD, arXiv:2105.05912, with swaps to first order for its generator)."""
    alpha: float = 1.0
    """Share of the teacher; the rest is cross-entropy with the text."""
    weight: float = 1.0
    """Weight of what is added."""
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
        require(0 <= self.alpha <= 1, f"{owner}.alpha is {self.alpha}: it must be in [0, 1]")
        for name in ("weight", "size", "steps", "swaps"):
            value = getattr(self, name)
            require(value > 0, f"{owner}.{name} is {value}: it must be positive")
        require(
            self.swap_vocabulary > 1,
            f"{owner}.swap_vocabulary is {self.swap_vocabulary}: a swap needs another token",
        )


class _Pass(NamedTuple):
    """The student's reading of a batch; N = B·L."""

    student: LazyLogits
    targets: Int[Array, "N"]
    valid: Bool[Array, "N"]
    columns: VocabularyChunks
    stats: RouterStats | None

    def losses(self, loss: Array, normaliser: Array) -> Losses:
        """`loss` as what is minimised; the cross-entropy is reported beside it."""
        plain = distill.cross_entropy(self.student, self.targets, self.columns)
        zero = jnp.zeros((), jnp.float32)
        stats = {} if self.stats is None else {"sparse": self.stats._replace(experts=None)}
        balance = sum((s.loss.sum() for s in stats.values()), zero)
        return Losses(distill.total(plain, self.valid, normaliser), zero, balance, stats, loss)


def _pass(
    model: Transformer, batch: Batch, length: int, key: Array | None, t: float = 1.0
) -> _Pass:
    require(model.config.mtp_depth == 0, "these objectives do not support multi-token prediction")
    attention = document_context(model.config, batch["segments"][:, :length])
    hidden, _, stats = model.hidden(batch["tokens"][:, :length], attention, key=key)
    student = lazy_logits(model, hidden)
    targets, valid = shifted_targets(batch["tokens"], batch["segments"], length, 1)
    columns = vocabulary_chunks([student], temperature=t)
    return _Pass(student, targets.reshape(-1), valid.reshape(-1), columns, stats)


def weighted_objective(
    model: Transformer, batch: Batch, length: int, normalisers: list[Array], key: Array | None
) -> Losses:
    """Cross-entropy whose sequences weigh batch[WEIGHT] (adversarial.reweight.item_weights)."""
    found = _pass(model, batch, length, key)
    values = distill.cross_entropy(found.student, found.targets, found.columns)
    values *= jnp.repeat(batch[WEIGHT], length)
    return found.losses(distill.total(values, found.valid, normalisers[0]), normalisers[0])


def smoothed_objective(epsilon: float) -> Objective:
    """Label smoothing (adversarial.controls). UserError: epsilon outside [0, 1)."""
    require(0 <= epsilon < 1, f"label smoothing epsilon is {epsilon}: it must be in [0, 1)")

    def objective(
        model: Transformer, batch: Batch, length: int, normalisers: list[Array], key: Array | None
    ) -> Losses:
        found = _pass(model, batch, length, key)
        values = controls.label_smoothing(found.student, found.targets, found.columns, epsilon)
        return found.losses(distill.total(values, found.valid, normalisers[0]), normalisers[0])

    return objective


def guess_objective(alpha: float, teacher: ModelConfig) -> Objective:
    """(1 - alpha) · CE + alpha · cross-entropy with the teacher's best guess and uniform rest. A
    step takes the teacher's (parameters, router) as its third argument."""
    graph = split_model(teacher)[0]

    def objective(
        model: Transformer,
        batch: Batch,
        length: int,
        normalisers: list[Array],
        key: Array | None,
        state: State,
    ) -> Losses:
        found = _pass(model, batch, length, key)
        tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
        taught = lazy_forward(nnx.merge(graph, *state), tokens, segments)
        values = (1 - alpha) * distill.cross_entropy(found.student, found.targets, found.columns)
        values += alpha * controls.guess_and_uniform(found.student, taught, found.columns)
        return found.losses(distill.total(values, found.valid, normalisers[0]), normalisers[0])

    return objective


def perturbed_objective(settings: PerturbConfig, teacher: ModelConfig) -> Objective:
    """Distillation, and what `settings` adds. A step takes the teacher's (parameters, router) as
    its third argument."""
    graph = split_model(teacher)[0]

    def objective(
        model: Transformer,
        batch: Batch,
        length: int,
        normalisers: list[Array],
        key: Array | None,
        state: State,
    ) -> Losses:
        assert key is not None, "a perturbation draws"
        found = _pass(model, batch, length, key)
        tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
        frozen = nnx.merge(graph, *state)

        def total(values: Array) -> Array:
            return distill.total(values, found.valid, normalisers[0])

        def taught(student: LazyLogits, tokens: Array) -> Array:
            outputs = [lazy_forward(frozen, tokens, segments)]
            return total(divergence(student, outputs, found.columns, Divergence()))

        loss = settings.alpha * taught(found.student, tokens)
        plain = distill.cross_entropy(found.student, found.targets, found.columns)
        loss += (1 - settings.alpha) * total(plain)
        if settings.kind != "none":
            added = _shifted if settings.kind in ("virtual", "random") else _swapped
            draw = jax.random.fold_in(key, 1)
            loss += settings.weight * added(settings, model, found, tokens, segments, draw, taught)
        return found.losses(loss, normalisers[0])

    return objective


def _without_gradient(model: Transformer) -> Transformer:
    """The same model as a constant: a perturbation is found by differentiating it once, and that
    derivative need not be differentiated again."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.lax.stop_gradient(state))


def _read_shifted(model: Transformer, tokens: Array, segments: Array, shift: Array) -> LazyLogits:
    attention = document_context(model.config, segments)
    return lazy_logits(model, model.hidden(tokens, attention, shift=shift)[0])


def _shifted(
    settings: PerturbConfig,
    model: Transformer,
    found: _Pass,
    tokens: Array,
    segments: Array,
    key: Array,
    taught: Callable[[LazyLogits, Array], Array],
) -> Array:
    """KL(q(x) ‖ q(x + shift)), q(x) without dropout and without gradient."""
    fixed = _without_gradient(model)
    clean, embedded = lazy_forward(fixed, tokens, segments), fixed.embed(tokens)
    valid, count = found.valid, jnp.maximum(found.valid.sum(), 1)

    def apart(model: Transformer, shift: Array) -> Array:
        moved = _read_shifted(model, tokens, segments, shift)
        values = divergence(moved, [clean], found.columns, Divergence())
        return distill.total(values, valid, count)

    radius = perturb.radius_of(embedded, settings.size)
    if settings.kind == "random":
        return apart(model, perturb.random_shift(key, embedded, radius))
    worst = partial(apart, fixed)
    shift = perturb.adversarial_shift(worst, key, embedded, radius, steps=settings.steps)
    return apart(model, shift)


def _swapped(
    settings: PerturbConfig,
    model: Transformer,
    found: _Pass,
    tokens: Array,
    segments: Array,
    key: Array,
    taught: Callable[[LazyLogits, Array], Array],
) -> Array:
    """The divergence from the teacher where both read the text with some tokens swapped."""
    if settings.kind == "random_swaps":
        other = perturb.random_swaps(key, tokens, settings.swaps, settings.swap_vocabulary)
    else:
        fixed = _without_gradient(model)

        def apart(shift: Array) -> Array:
            return taught(_read_shifted(fixed, tokens, segments, shift), tokens)

        gradient = jax.grad(apart)(jnp.zeros_like(fixed.embed(tokens)))
        table = fixed.embedding[...]
        other = perturb.adversarial_swaps(
            gradient, table, tokens, settings.swaps, settings.swap_vocabulary
        )
    return taught(lazy_forward(model, other, segments), other)


@dataclass(frozen=True)
class GenerativeConfig:
    """Generative adversarial distillation; the defaults are the paper's (arXiv:2511.10643)."""

    group: int = 8
    """Continuations of one prompt (n)."""
    anchor: float = 1e-3
    """Weight of KL(student ‖ starting student) on the written tokens."""
    clip: float = 0.2
    """Largest change of a token's probability ratio that is rewarded; it acts from the second
    update on the same samples on."""
    temperature: float = 0.8
    """At which the student samples and is scored."""

    def __post_init__(self) -> None:
        owner = "generative"
        require(self.group >= 2, f"{owner}.group is {self.group}: a mean needs at least 2")
        require(self.anchor >= 0, f"{owner}.anchor is {self.anchor}: it must not be negative")
        for name in ("clip", "temperature"):
            value = getattr(self, name)
            require(value > 0, f"{owner}.{name} is {value}: it must be positive")


def policy_objective(settings: GenerativeConfig, start: ModelConfig) -> Objective:
    """Policy gradient on batch[ADVANTAGE] and the anchor, over the tokens that batch[OWN] marks.

    A step takes the starting student's (parameters, router) as its third argument. The batch's
    "old_log_q", float32[B, L], are the log-probabilities at sampling; without it the samples are
    taken to be the current student's.
    """
    graph = split_model(start)[0]

    def objective(
        model: Transformer,
        batch: Batch,
        length: int,
        normalisers: list[Array],
        key: Array | None,
        state: State,
    ) -> Losses:
        found = _pass(model, batch, length, key, settings.temperature)
        own = batch[OWN]
        log_q = distill.token_logit(found.student, found.targets) / settings.temperature
        log_q -= distill.log_normaliser(found.student, found.columns)
        log_q = log_q.reshape(own.shape)
        old = batch.get("old_log_q", jax.lax.stop_gradient(log_q))
        loss = generative.policy_loss(log_q, old, batch[ADVANTAGE], own, settings.clip)
        if settings.anchor:
            tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
            first = lazy_forward(nnx.merge(graph, *state), tokens, segments)
            apart = divergence(found.student, [first], found.columns, Divergence("reverse"))
            loss += settings.anchor * distill.total(apart, own.reshape(-1), own.sum())
        return found.losses(loss, normalisers[0])

    return objective


class DiscriminatorState(NamedTuple):
    """Everything that an update of the discriminator changes."""

    parameters: Any
    router: Any
    optimizer: optax.OptState


def make_discriminator_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[DiscriminatorState, Array, Array]]:
    """(state, teacher's text int32[N, L], student's int32[N, L]) -> (state, loss, accuracy before
    the update). Rows are pairs with the same prompt."""

    def step(
        state: DiscriminatorState, teacher: Array, student: Array
    ) -> tuple[DiscriminatorState, Array, Array]:
        def loss(parameters: Any) -> tuple[Array, Array]:
            judge = nnx.merge(graph, parameters, state.router)
            scores = judge(jnp.concatenate([teacher, student]))
            real, own = jnp.split(scores, 2)
            return generative.discriminator_loss(real, own), generative.accuracy(real, own)

        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
        updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return DiscriminatorState(parameters, state.router, moments), value, right

    return step


def sequence_nats(model: Transformer, batch: Batch, length: int) -> Float[Array, "B"]:
    """Mean -log q of each sequence's targets: what selection by loss compares."""
    found = _pass(model, batch, length, None)
    values = distill.cross_entropy(found.student, found.targets, found.columns)
    values, valid = (a.reshape(-1, length) for a in (values, found.valid))
    return jnp.where(valid, values, 0).sum(-1) / jnp.maximum(valid.sum(-1), 1)


def states(state: TrainState) -> State:
    """What a step takes of a trained model as its teacher or start."""
    return state.parameters, state.router
