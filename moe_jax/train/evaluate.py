"""Bits per byte on held-out text: a number that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax import Array

from moe_jax.config import TrainConfig
from moe_jax.data.batches import shifted_targets, validation_batches
from moe_jax.data.tokens import TokenArray
from moe_jax.model.attention import document_context
from moe_jax.objectives.next_token import Batch, token_nats
from moe_jax.train.step import TrainState, graph_of


def make_evaluator(
    config: TrainConfig, validation: TokenArray, place: Callable[[Batch], Batch]
) -> Callable[[TrainState], float]:
    """state -> sum of -log2 p(token) over the held-out text / its bytes.

    Every token of every held-out document is predicted once, the end-of-document token included,
    from the tokens before it in its document and its window of `data.length`.
    """
    graph = graph_of(config.resolved_model())
    length = config.data.length

    @jax.jit
    def nats(parameters: Any, router: Any, batch: Batch) -> Array:
        model = nnx.merge(graph, parameters, router)
        tokens, segments = batch["tokens"], batch["segments"]
        hidden, _, _ = model.hidden(
            tokens[:, :length], document_context(model.config, segments[:, :length])
        )
        targets, mask = shifted_targets(tokens, segments, length, 1)
        return token_nats(model.logits(hidden), targets, mask)

    def batches() -> Iterator[Any]:
        return validation_batches(
            validation,
            length,
            config.batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluate(state: TrainState) -> float:
        parts = [nats(state.parameters, state.router, place(batch)) for batch in batches()]
        total = math.fsum(float(part) for part in parts)
        return total / math.log(2) / validation.bytes

    return evaluate
