"""Training on a teacher: objectives, and batches that the student wrote itself.

step = make_step(config, cached_objective(settings))           # batches with a TeacherCache
step = make_step(config, online_objective(settings, models))   # step(state, batch, states)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from moe_jax.base.initial import root_key
from moe_jax.config import DistillConfig, ModelConfig, require
from moe_jax.distill import losses as distill
from moe_jax.distill.chunked import LazyLogits, VocabularyChunks, divergence, vocabulary_chunks
from moe_jax.distill.divergences import Divergence
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.objectives.base import OWN, Batch, Loss, Objective, Reading

States = tuple[Any, Any]
"""(parameters, router biases) of a model."""


def online_objective(
    settings: DistillConfig,
    teachers: Sequence[ModelConfig],
    weights: Sequence[float] | None = None,
    vocabulary: int | None = None,
) -> Objective:
    """Distillation from teachers that read every batch.

    A step takes their States, one for each, as its third argument. `vocabulary` is the number of
    tokens that all models share. It is needed where their tables differ in height.
    """
    graphs = [graph_of(model) for model in teachers]
    kind = Divergence(settings.kind, settings.mix)

    def objective(reading: Reading, states: Sequence[States]) -> Loss:
        outputs = [
            reading.read_by(nnx.merge(graph, *state))
            for graph, state in zip(graphs, states, strict=True)
        ]

        def divergences(student: LazyLogits, log_z: Array) -> Array:
            chunks = vocabulary_chunks(
                [student, *outputs], vocabulary, settings.chunk, settings.temperature
            )
            return divergence(student, outputs, chunks, kind, weights)

        return _mixture(reading, settings, divergences)

    return objective


def cached_objective(settings: DistillConfig) -> Objective:
    """Distillation from a cache of the teacher's outputs, sampled tokens or its top k.

    Batches come from train_batches(…, beside=TeacherCache).
    """

    def objective(reading: Reading) -> Loss:
        batch = reading.batch
        cached = batch["teacher_tokens"]  # [B, L, tokens a position]
        tokens = cached.reshape(-1, cached.shape[-1])

        def divergences(student: LazyLogits, log_z: Array) -> Array:
            chunks = _chunks(student, settings)
            if "teacher_log_p" not in batch:
                # At temperature 1 the divergence has the cross-entropy's own normaliser.
                shared = log_z if settings.temperature == 1 else None
                return distill.sampled(student, tokens, chunks, shared)
            # 0 where nothing is compared: whatever the cache has there reaches no gradient.
            log_p = batch["teacher_log_p"].reshape(tokens.shape)
            log_p = jnp.where(reading.targets()[1][:, None], log_p, 0)
            return distill.top_k_tail(student, tokens, log_p, chunks)

        return _mixture(reading, settings, divergences)

    return objective


def _chunks(student: LazyLogits, settings: DistillConfig) -> VocabularyChunks:
    return vocabulary_chunks([student], None, settings.chunk, settings.temperature)


def _mixture(
    reading: Reading, settings: DistillConfig, divergences: Callable[[LazyLogits, Array], Array]
) -> Loss:
    """(1 - alpha) CE + alpha t² divergence over the valid targets.

    `divergences` maps the student's logits and its log-normaliser at temperature 1 to one value a
    position. Tokens that the student wrote itself have no cross-entropy: it would only confirm
    them.
    """
    student = reading.logits
    targets, valid = reading.targets()
    own = reading.batch.get(OWN)
    from_text = valid if own is None else valid & ~own[:, : reading.length].reshape(-1)
    chunks = _chunks(student, settings)
    log_z = distill.log_normaliser(student, chunks._replace(temperature=1.0))
    nats = distill.cross_entropy(student, targets, chunks, log_z)
    cross_entropy = distill.total(nats, from_text, reading.normaliser)
    loss = (1 - settings.alpha) * cross_entropy
    if settings.alpha > 0:
        # t²: a divergence at temperature t has gradients that are smaller by t² (arXiv:1503.02531).
        factor = settings.alpha * settings.temperature**2
        loss += factor * distill.total(divergences(student, log_z), valid, reading.normaliser)
    return Loss(cross_entropy, loss)


def is_on_policy(settings: DistillConfig, seed: int, step: int) -> bool:
    """Whether the student writes batch `step` itself, with probability distill.on_policy.

    It depends on seed and step alone, so a resumed run decides the same again.
    """
    key = jax.random.fold_in(root_key(seed), step)
    return bool(jax.random.uniform(key) < settings.on_policy)


def own_batch(
    settings: DistillConfig,
    model: ModelConfig,
    states: States,
    batch: Batch,
    key: Array,
    *,
    vocabulary: int,
    end: int | None = None,
) -> Batch:
    """The first `prompt` tokens of each row, continued by the student at temperature 1.

    Source: arXiv:2306.13649, algorithm 1. No gradient passes through the sampling. The student goes
    on with the last document of the prompt. After the token `end`, which closes a document, the row
    is padding. Nothing ends a document if it is None. UserError: the prompt leaves nothing to
    write.
    """
    length = batch["tokens"].shape[1]
    require(
        settings.prompt < length,
        f"distill.prompt={settings.prompt} leaves nothing of a window of {length} tokens",
    )
    prompt = batch["tokens"][:, : settings.prompt]
    segments = batch["segments"][:, : settings.prompt]
    written = generate(
        graph_of(model),
        states,
        prompt,
        key,
        count=length - settings.prompt,
        vocabulary=vocabulary,
        temperature=1.0,
        segments=segments,
    )
    tokens = jnp.concatenate([prompt, written.astype(prompt.dtype)], axis=1)
    # own[t] speaks of token t + 1, so the first true entry is the last token of the prompt.
    own = jnp.broadcast_to(jnp.arange(1, length) >= settings.prompt, (len(prompt), length - 1))
    return {"tokens": tokens, "segments": own_segments(segments, tokens, end), OWN: own}


def own_segments(
    segments: Int[Array, "B L"], tokens: Int[Array, "B N"], end: int | None
) -> Int[Array, "B N"]:
    """The prompt's segments, then its last one up to the first `end`, which may be its own."""
    begin = segments.shape[1]
    last = segments[:, -1:]
    # A token is in the document if no token from the prompt's last on has ended it before.
    ends = jnp.zeros((), bool) if end is None else tokens[:, begin - 1 : -1] == end
    ended = jnp.cumsum(jnp.broadcast_to(ends, tokens[:, begin:].shape), axis=1)
    return jnp.concatenate([segments, jnp.where(ended == 0, last, 0)], axis=1)


def text_batch(batch: Batch) -> Batch:
    """A batch of the text in the form of own_batch, so that one compiled step serves both."""
    rows, length = batch["tokens"].shape
    return {**batch, OWN: jnp.zeros((rows, length - 1), bool)}
