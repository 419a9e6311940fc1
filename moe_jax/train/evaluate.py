"""Bits per byte on held-out text: a number that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from moe_jax.config import TrainConfig
from moe_jax.data.batches import shifted_targets, validation_batches
from moe_jax.data.tokens import TokenArray
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import Batch, token_nats
from moe_jax.train.state import TrainState


def make_evaluator(
    config: TrainConfig, validation: TokenArray, place: Callable[[Batch], Batch]
) -> Callable[[TrainState], float]:
    """state -> sum of -log2 p(token) over the held-out text / its bytes.

    Every token of every held-out document is predicted once, the end-of-document token included,
    from the tokens before it in its document and its window of `data.length`.
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
        batches = map(place, held_out_batches(config, validation))
        # All batches are started before the first result is waited for.
        parts = [nats(state.parameters, state.router, batch) for batch in batches]
        return bits_per_byte(map(float, parts), validation)

    return evaluate


def held_out_batches(config: TrainConfig, validation: TokenArray) -> Iterable[Any]:
    """This process's share of the held-out text."""
    return validation_batches(
        validation,
        config.data.length,
        config.batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def batch_nats(model: Transformer, hidden: Float[Array, "B L D"], batch: Batch) -> Float[Array, ""]:
    """Sum of -log p over the batch's targets, from the residual stream after the last block."""
    tokens = batch["tokens"]
    targets, mask = shifted_targets(tokens, batch["segments"], hidden.shape[1], 1)
    return token_nats(model.logits(hidden), targets, mask)


def bits_per_byte(nats: Iterable[float], validation: TokenArray) -> float:
    """The held-out text's nats as bits, divided by its bytes."""
    # fsum: the exact sum, so that the order of the batches does not matter.
    return math.fsum(nats) / math.log(2) / validation.bytes
