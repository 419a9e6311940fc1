"""Bits per byte on held-out text: a number that does not depend on the tokenizer."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.base.console import paced
from moe_jax.config import TrainConfig
from moe_jax.data.batches import validation_batches
from moe_jax.data.tokens import TokenArray
from moe_jax.model.abstract import graph_of
from moe_jax.objectives.base import Batch
from moe_jax.objectives.next_token import batch_nats
from moe_jax.train.state import TrainState

AHEAD = 8
"""Batches that are started before the result of one is waited for."""


def make_evaluator(
    config: TrainConfig,
    validation: TokenArray,
    place: Callable[[Batch], Batch],
    rows: np.ndarray | None = None,
) -> Callable[[TrainState], float]:
    """state -> sum of -log2 p(token) over the held-out text / its bytes.

    Every token of every held-out document is predicted once, the end-of-document token included,
    from the tokens before it in its document and its window of `data.length`. `rows`: the rows of
    each batch that this process reads and `place` takes. Unset, all of them.
    """
    graph = graph_of(config.model)
    length = config.data.length

    @jax.jit
    def nats(parameters: Any, router: Any, batch: Batch) -> Array:
        model = nnx.merge(graph, parameters, router)
        tokens = batch["tokens"][:, :length]
        hidden, _ = model.hidden(tokens, batch["segments"][:, :length])
        return batch_nats(model, hidden, batch)

    def evaluate(state: TrainState) -> float:
        batches = map(place, held_out_batches(config, validation, rows))
        parts = (nats(state.parameters, state.router, batch) for batch in batches)
        return bits_per_byte(map(float, started_ahead(parts)), validation)

    return evaluate


def started_ahead(parts: Iterable[Array]) -> Iterator[Array]:
    """The parts in order, each when the next AHEAD are started.

    The device then never waits for the host, and holds the batches of a few and not of all.
    """
    started: deque[Array] = deque()
    for part in parts:
        started.append(part)
        if len(started) > AHEAD:
            yield started.popleft()
    yield from started


def held_out_batches(
    config: TrainConfig, validation: TokenArray, rows: np.ndarray | None = None
) -> Iterable[Any]:
    """The held-out text in batches, of which this process reads these rows.

    A line of progress is printed where reading them takes long.
    """
    batches = validation_batches(validation, config.data.length, config.batch, rows=rows)
    windows = -(-(len(validation.tokens) - 1) // config.data.length)
    return paced(batches, "evaluating, batch", -(-windows // config.batch))


def bits_per_byte(nats: Iterable[float], validation: TokenArray) -> float:
    """The held-out text's nats as bits, divided by its bytes."""
    # fsum: the exact sum, so that the order of the batches does not matter.
    return math.fsum(nats) / math.log(2) / validation.bytes
