"""What lever_distillation asks of students beside their loss, and a cache along their batches."""

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
from jaxtyping import Float, Int
from placement_model import DOMAINS, domain_texts

from moe_jax.config import ModelConfig
from moe_jax.data.batches import Windows
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.cache import CacheConfig, build_cache
from moe_jax.distill.specialise import specialisation
from moe_jax.distill.teacher import Teacher, split_model
from moe_jax.model.generate import generate

State = tuple[Any, Any]
"""(parameters, router)"""
TEXTS, LENGTH = 64, 128
"""Of each domain, so many texts of so many bytes route through the experts."""
SPREAD = 1000
"""Bytes of the library from which one text comes, so that many files are read."""
WRITTEN, PROMPT = 128, 32
"""Continuations that a student is judged by, and the bytes of text before each."""


def of_experts(model: ModelConfig, state: State) -> dict[str, list[float]]:
    """distill.specialise of a student on code, prose and tables."""
    tokens, classes = domain_batch()
    return specialisation(model, *state, tokens, classes)._asdict()


@cache
def domain_batch() -> tuple[Int[np.ndarray, "N L"], Int[np.ndarray, "N"]]:
    """TEXTS of each domain as bytes, and the domain's number; of the standard library, so that a
    student has read most of them: what counts is where it sends them."""
    found: dict[str, bytes] = dict.fromkeys((str(domain) for domain in DOMAINS), b"")
    for _, domain, text in domain_texts():
        found[domain] += text.encode()
        if min(len(part) for part in found.values()) >= TEXTS * SPREAD:
            break
    parts = [np.frombuffer(part, np.uint8) for part in found.values()]
    starts = [np.linspace(0, len(part) - LENGTH, TEXTS, dtype=int) for part in parts]
    texts = [
        p[start : start + LENGTH] for p, row in zip(parts, starts, strict=True) for start in row
    ]
    return np.stack(texts).astype(np.int32), np.repeat(np.arange(len(DOMAINS)), TEXTS)


def of_own_text(
    model: ModelConfig, state: State, teacher: Teacher, text: TokenArray, batch: int
) -> dict[str, float]:
    """own_text_bits: mean over bytes that the student wrote of log2 q - log2 p, an estimate of
    KL(student ‖ teacher) on the student's own text: what on-policy distillation lowers."""
    count, total = LENGTH + 1 - PROMPT, 0.0
    windows = Windows(text, LENGTH, 0, WRITTEN)
    for begin in range(0, WRITTEN, batch):
        rows = range(begin, begin + batch)
        prompt = jnp.stack([windows[row]["tokens"][:PROMPT] for row in rows])
        key = jax.random.fold_in(jax.random.key(0), begin)
        written = generate(
            split_model(model)[0],
            state,
            prompt,
            key,
            count=count,
            vocabulary=teacher.tokenizer.vocabulary,
            temperature=1.0,
        )
        tokens = jnp.concatenate([prompt, written.astype(prompt.dtype)], axis=1)
        nats = [
            _nats(*of, tokens, graph=split_model(config)[0])
            for config, of in ((teacher.model, teacher[1:3]), (model, state))
        ]
        total += float((nats[0] - nats[1]).sum())
    return {"own_text_bits": total / math.log(2) / (WRITTEN * count)}


@partial(jax.jit, static_argnames="graph")
def _nats(
    parameters: Any, router: Any, tokens: Int[Array, "B L"], *, graph: nnx.GraphDef
) -> Float[Array, "B"]:
    """-log of the probability of all tokens after the prompt."""
    model = nnx.merge(graph, parameters, router)
    log_q = jax.nn.log_softmax(model(tokens, jnp.ones_like(tokens))[:, :-1])
    picked = jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1)[..., 0]
    return -picked[:, PROMPT - 1 :].sum(axis=-1)


def with_cache(
    batches: list[Any], teacher: Teacher, config: CacheConfig, folder: Path
) -> Iterator[dict[str, Any]]:
    """The batches, each with what a teacher's cache keeps of it.

    Students see few of the text's windows, so the cache is built along the windows that they see,
    in their order: each begins a document, which leaves its inputs as they were.
    """
    tokens = np.concatenate([b["tokens"] for b in batches])
    segments = np.concatenate([b["segments"] for b in batches])[:, :-1]
    begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    stream = np.append(tokens[:, :-1], tokens[-1, -1]).astype(np.uint16)
    starts = np.flatnonzero(begins.reshape(-1))
    array = TokenArray(stream, starts, len(stream), teacher.tokenizer)
    length = tokens.shape[1] - 1
    kept = build_cache(folder / "cache", teacher, array, length, config, lambda line: None)
    row = 0
    for batch in batches:
        beside = [kept[row + index] for index in range(len(batch["tokens"]))]
        row += len(beside)
        yield batch | {name: np.stack([r[name] for r in beside]) for name in beside[0]}
