"""What a trained student is like beside its loss, and a teacher's cache along given batches."""

import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.data.batches import Windows, shifted_targets
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.cache import CacheConfig, build_cache
from moe_jax.distill.specialise import specialisation
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of
from moe_jax.model.generate import generate
from moe_jax.objectives.distillation import own_segments
from moe_jax.study.domains import DOMAINS, domain_texts

State = tuple[Any, Any]
"""(parameters, router)"""
TEXTS = 64
"""Texts of each domain that are routed through the experts."""
LENGTH = 128
"""Bytes of each."""
SPREAD = 1000
"""Bytes of the library for each text, so that the texts come from many files."""
WRITTEN = 128
"""Continuations by which a student is judged."""
PROMPT = 32
"""Bytes of text before each."""


def of_experts(model: ModelConfig, state: State) -> dict[str, list[float]]:
    """distill.specialise's fields for a student on code, prose and tables, a value a block."""
    tokens, classes = domain_batch()
    return specialisation(model, *state, tokens, classes)._asdict()


@cache
def domain_batch() -> tuple[Int[np.ndarray, "N L"], Int[np.ndarray, "N"]]:
    """(TEXTS of each domain as bytes, the number of each one's domain).

    They are of the standard library, so a student has read most of them. That does no harm: the
    question is where it sends them, and not how well it predicts them.
    """
    texts: dict[str, bytes] = dict.fromkeys((str(domain) for domain in DOMAINS), b"")
    for _, domain, text in domain_texts():
        texts[domain] += text.encode()
        if min(len(part) for part in texts.values()) >= TEXTS * SPREAD:
            break
    rows = []
    for part in texts.values():
        data = np.frombuffer(part, np.uint8)
        starts = np.linspace(0, len(data) - LENGTH, TEXTS, dtype=int)
        rows += [data[start : start + LENGTH] for start in starts]
    return np.stack(rows).astype(np.int32), np.repeat(np.arange(len(DOMAINS)), TEXTS)


def of_own_text(
    model: ModelConfig, state: State, teacher: Teacher, text: TokenArray, batch: int
) -> dict[str, float]:
    """own_text_bits: an estimate of KL(student ‖ teacher) on the student's own text, bits a byte.

    It is the mean over the bytes that the student wrote of log2 q - log2 p, with q the student's
    probability of the byte and p the teacher's. Nothing after the document's end counts. On-policy
    distillation lowers it.
    """
    count = LENGTH + 1 - PROMPT
    windows = Windows(text, LENGTH, 0, WRITTEN)
    total = 0.0
    counted = 0
    for begin in range(0, WRITTEN, batch):
        rows = range(begin, begin + batch)
        prompt = jnp.stack([windows[row]["tokens"][:PROMPT] for row in rows])
        segments = jnp.stack([windows[row]["segments"][:PROMPT] for row in rows])
        written = generate(
            graph_of(model),
            state,
            prompt,
            jax.random.fold_in(jax.random.key(0), begin),
            count=count,
            vocabulary=teacher.tokenizer.vocabulary,
            temperature=1.0,
            segments=segments,
        )
        tokens = jnp.concatenate([prompt, written.astype(prompt.dtype)], axis=1)
        segments = own_segments(segments, tokens, teacher.tokenizer.eos)
        of_teacher = _nats(*teacher[1:3], tokens, segments, graph=graph_of(teacher.model))
        of_student = _nats(*state, tokens, segments, graph=graph_of(model))
        total += float((of_teacher - of_student).sum())
        counted += int(_written(segments).sum())
    return {"own_text_bits": total / math.log(2) / max(counted, 1)}


def _written(segments: Int[Array, "B L"]) -> Bool[Array, "B count"]:
    """Which tokens after the prompt belong to a document, its end included."""
    # Position t predicts token t + 1, so the first written token is predicted at PROMPT - 1.
    return shifted_targets(segments, segments, segments.shape[1] - 1)[1][:, PROMPT - 1 :]


@partial(jax.jit, static_argnames="graph")
def _nats(
    parameters: Any,
    router: Any,
    tokens: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    *,
    graph: nnx.GraphDef,
) -> Float[Array, "B"]:
    """-log of the probability of the tokens after the prompt, up to the end of their document."""
    model = nnx.merge(graph, parameters, router)
    log_q = jax.nn.log_softmax(model(tokens, segments)[:, :-1])
    picked = jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(_written(segments), picked[:, PROMPT - 1 :], 0).sum(axis=-1)


def with_cache(
    batches: list[Any], teacher: Teacher, config: CacheConfig, folder: Path
) -> Iterator[dict[str, Any]]:
    """The batches, each with the teacher's cached outputs for its tokens.

    Students read few of the text's windows, so the cache is built along the windows that they read,
    in their order. In the stream that the teacher reads each window begins a document, which leaves
    the window's inputs as they were.
    """
    tokens = np.concatenate([b["tokens"] for b in batches])  # [rows, length + 1]
    segments = np.concatenate([b["segments"] for b in batches])[:, :-1]
    begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    stream = np.append(tokens[:, :-1], tokens[-1, -1]).astype(np.uint16)
    starts = np.flatnonzero(begins.reshape(-1))
    array = TokenArray(stream, starts, len(stream), teacher.tokenizer)
    length = tokens.shape[1] - 1
    outputs = build_cache(folder / "cache", teacher, array, length, config, lambda line: None)
    row = 0
    for batch in batches:
        beside = [outputs[row + index] for index in range(len(batch["tokens"]))]
        row += len(beside)
        yield batch | {name: np.stack([r[name] for r in beside]) for name in beside[0]}
