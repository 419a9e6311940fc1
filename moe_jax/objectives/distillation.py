"""Training on a teacher: objectives for make_step, and batches that the student wrote itself.

step = make_step(config, cached_objective(settings))           # batches with a TeacherCache
step = make_step(config, online_objective(settings, models))   # step(state, batch, states)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig, require
from moe_jax.config.distill import DistillConfig
from moe_jax.data.batches import shifted_targets
from moe_jax.distill import losses as distill
from moe_jax.distill.chunked import LazyLogits, VocabularyChunks, divergence, vocabulary_chunks
from moe_jax.distill.divergences import Divergence
from moe_jax.distill.teacher import lazy_forward, lazy_logits, split_model
from moe_jax.model.attention import document_context
from moe_jax.model.generate import generate
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.next_token import Batch, Losses, mtp_loss
from moe_jax.train.step import Objective, TrainState

OWN = "own"
"""Key of a batch: bool[B, L + mtp_depth], true where the token after t is the student's own."""


def online_objective(
    settings: DistillConfig,
    teachers: Sequence[ModelConfig],
    weights: Sequence[float] | None = None,
    vocabulary: int | None = None,
) -> Objective:
    """The teachers read every batch. A step takes their [(parameters, router), …] as its third
    argument, so that they are no constants of the program. `vocabulary`: tokens that all have,
    where their tables are of different heights."""
    graphs = [split_model(model)[0] for model in teachers]
    kind = Divergence(settings.kind, settings.mix)

    def objective(
        model: Transformer,
        batch: Batch,
        length: int,
        normalisers: list[Array],
        key: Array | None,
        states: Sequence[tuple[Any, Any]],
    ) -> Losses:
        tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
        outputs = [
            lazy_forward(nnx.merge(graph, *state), tokens, segments)
            for graph, state in zip(graphs, states, strict=True)
        ]

        def apart(student: LazyLogits, log_z: Array) -> Array:
            columns = vocabulary_chunks(
                [student, *outputs], vocabulary, settings.chunk, settings.temperature
            )
            return divergence(student, outputs, columns, kind, weights)

        return _losses(model, batch, length, normalisers, key, settings, apart)

    return objective


def cached_objective(settings: DistillConfig) -> Objective:
    """For batches from train_batches(…, beside=TeacherCache), sampled or top-k."""

    def objective(
        model: Transformer,
        batch: Batch,
        length: int,
        normalisers: list[Array],
        key: Array | None = None,
    ) -> Losses:
        tokens = batch["teacher_tokens"].reshape(-1, batch["teacher_tokens"].shape[-1])

        def apart(student: LazyLogits, log_z: Array) -> Array:
            columns = _columns(student, settings)
            if "teacher_log_p" not in batch:
                shared = log_z if settings.temperature == 1 else None
                return distill.sampled(student, tokens, columns, shared)
            log_p = batch["teacher_log_p"].reshape(tokens.shape)
            return distill.top_k_tail(student, tokens, log_p, columns)

        return _losses(model, batch, length, normalisers, key, settings, apart)

    return objective


def _columns(student: LazyLogits, settings: DistillConfig) -> VocabularyChunks:
    return vocabulary_chunks([student], None, settings.chunk, settings.temperature)


def _losses(
    model: Transformer,
    batch: Batch,
    length: int,
    normalisers: list[Array],
    key: Array | None,
    settings: DistillConfig,
    apart: Callable[[LazyLogits, Array], Array],
) -> Losses:
    """(1 - alpha) CE + alpha t² divergence over the valid targets; the student's own tokens have no
    cross_entropy and no multi-token prediction, which would only confirm them. `apart`(student, its
    log_normaliser at temperature 1) is the divergence of each position."""
    tokens, segments = batch["tokens"], batch["segments"]
    attention = document_context(model.config, segments[:, :length])
    depth, mtp_key = model.config.mtp_depth, None
    if depth and key is not None:
        key, mtp_key = jax.random.split(key)
    hidden, _, stats = model.hidden(tokens[:, :length], attention, key=key)
    student = lazy_logits(model, hidden)
    targets, valid = (a.reshape(-1) for a in shifted_targets(tokens, segments, length, 1))
    given = valid & ~batch[OWN][:, :length].reshape(-1) if OWN in batch else valid
    columns = _columns(student, settings)
    log_z = distill.log_normaliser(student, columns._replace(temperature=1.0))
    cross_entropy = distill.cross_entropy(student, targets, columns, log_z)
    cross_entropy = distill.total(cross_entropy, given, normalisers[0])
    loss = (1 - settings.alpha) * cross_entropy
    if settings.alpha > 0:
        factor = settings.alpha * settings.temperature**2
        loss += factor * distill.total(apart(student, log_z), valid, normalisers[0])
    collected = {} if stats is None else {"sparse": stats._replace(experts=None)}
    mtp = jnp.zeros((), jnp.float32)
    if depth:
        own = batch.get(OWN)
        mtp, more = mtp_loss(model, hidden, batch, length, normalisers[1:], mtp_key, own)
        collected |= more
    balance = sum((s.loss.sum() for s in collected.values()), jnp.zeros((), jnp.float32))
    return Losses(cross_entropy, mtp, balance, collected, loss)


def is_on_policy(settings: DistillConfig, seed: int, step: int) -> bool:
    """Whether batch `step` is the student's own: with probability lambda, and the same again when a
    run is resumed."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return bool(jax.random.uniform(key) < settings.on_policy)


def own_batch(
    settings: DistillConfig,
    model: ModelConfig,
    state: TrainState,
    batch: Batch,
    vocabulary: int,
) -> Batch:
    """The batch's first `prompt` tokens, continued by the student at temperature 1 (arXiv:
    2306.13649, algorithm 1); no gradient passes through the sampling. A row is one document, for
    the generator sees all of the prompt.

    UserError: the prompt leaves nothing to write.
    """
    length = batch["tokens"].shape[1]
    require(
        settings.prompt < length,
        f"distill.prompt={settings.prompt} leaves nothing of a window of {length} tokens",
    )
    prompt = batch["tokens"][:, : settings.prompt]
    written = generate(
        split_model(model)[0],
        (state.parameters, state.router),
        prompt,
        jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step),
        count=length - settings.prompt,
        vocabulary=vocabulary,
        temperature=1.0,
    )
    tokens = jnp.concatenate([prompt, written.astype(prompt.dtype)], axis=1)
    own = jnp.broadcast_to(jnp.arange(1, length) >= settings.prompt, (len(prompt), length - 1))
    return {"tokens": tokens, "segments": jnp.ones_like(tokens), OWN: own}


def text_batch(batch: Batch) -> Batch:
    """A batch of given text in the form of own_batch, so that one compiled step serves both."""
    rows, length = batch["tokens"].shape
    return {**batch, OWN: jnp.zeros((rows, length - 1), bool)}
