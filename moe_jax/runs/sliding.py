"""Bits per byte of a model on a text, by a window that slides over it."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.data.tokens import TokenArray
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of
from moe_jax.objectives.base import Batch
from moe_jax.objectives.next_token import batch_nats
from moe_jax.train.evaluate import bits_per_byte, started_ahead


def sliding_bits_per_byte(
    model: Teacher,
    text: TokenArray,
    *,
    context: int,
    stride: int,
    batch: int = 4,
    on_window: Callable[[int], None] = lambda count: None,
) -> float:
    """sum of -log2 p(token) over the text's tokens / its bytes.

    A window of `context` tokens moves by `stride`. Each token of each document, the end-of-document
    token included, is predicted once: from the context - stride tokens before the window's last
    `stride` ones at least, as far as its document reaches. Equal to train.evaluate where stride is
    context.
    """
    graph = graph_of(model.model)

    @jax.jit
    def nats(batch: Batch) -> Array:
        whole = nnx.merge(graph, model.parameters, model.router)
        hidden, _ = whole.hidden(batch["tokens"][:, :-1], batch["segments"][:, :-1])
        last = {name: rows[:, context - stride :] for name, rows in batch.items()}
        return batch_nats(whole, hidden[:, context - stride :], last)

    def parts() -> Iterator[Array]:
        for rows in windows(text, context, stride, batch):
            on_window(len(rows["tokens"]))
            yield nats(rows)

    return bits_per_byte(map(float, started_ahead(parts())), text)


def count_windows(text: TokenArray, stride: int) -> int:
    """Windows in which every token but the first is predicted once."""
    return -(-(len(text.tokens) - 1) // stride)


def windows(text: TokenArray, context: int, stride: int, batch: int) -> Iterator[Batch]:
    """Rows of context + 1 tokens, of which the last `stride` are to be predicted.

    The first row begins before the text. What lies outside of the text is of document 0.
    """
    total = count_windows(text, stride)
    for first in range(0, total, batch):
        # A last batch that is not full has rows that lie outside of the text.
        row = np.arange(first, first + batch)[:, None]
        places = row * stride - (context - stride) + np.arange(context + 1)
        inside = (places >= 0) & (places < len(text.tokens)) & (row < total)
        places = np.where(inside, places, 0)
        documents = np.searchsorted(text.starts, places, side="right")
        yield {
            "tokens": jnp.asarray(text.tokens[places].astype(np.int32)),
            "segments": jnp.asarray(np.where(inside, documents, 0).astype(np.int32)),
        }
