"""One update, and an evaluation, of a model whose experts live in tiers: a loop over its layers.

It computes what train.step computes, by the programs of programs.py. Between two programs the host
brings experts.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.data.tokens import TokenArray
from moe_jax.moe.layer import RouterStats
from moe_jax.objectives.base import Batch, Objective
from moe_jax.objectives.next_token import next_token
from moe_jax.train.engines.tiered.programs import (
    BlockParts,
    Chosen,
    Inputs,
    Weights,
    programs_of,
    without_stream,
)
from moe_jax.train.engines.tiered.store import TieredExperts
from moe_jax.train.evaluate import bits_per_byte, held_out_batches
from moe_jax.train.state import Metrics, TrainState

GROUP = 8
"""Validation batches that pass a layer together, so that its experts are brought once for all."""


class TieredStep:
    """(state, batch) -> (state, metrics), as make_step's function. The state is the trunk's."""

    def __init__(
        self, config: TrainConfig, experts: TieredExperts, objective: Objective = next_token
    ) -> None:
        self.config = config
        self.experts = experts
        self.layers = config.model.moe_layers
        self._programs = programs_of(config, objective)
        self.lines: dict[int, dict[str, Any]] = {}
        """Entries for metrics.jsonl, by the number of the update."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        run = self._programs
        experts = self.experts
        experts.prefetch(0)
        weights = Weights(state.parameters, state.router)
        inputs = Inputs(batch, state.step_key())
        x, pull_begin = run.begin(weights, inputs)
        passed: list[tuple[Chosen, Any]] = []
        active = []
        for layer in range(self.layers):
            at = jnp.int32(layer)
            chosen, pull = run.enter(weights, at, x, inputs)
            # Here the host waits for the device: the router decides which experts are needed.
            active.append(_active(chosen.stats))
            matrices = experts.need(layer, active[-1])
            experts.prefetch(layer + 1)
            x = run.leave(weights, at, chosen, inputs, matrices)
            passed.append((without_stream(chosen), pull))
        ended = run.end(weights, x, inputs)
        d_x = ended.x
        blocks: list[BlockParts] = []
        for layer in reversed(range(self.layers)):
            matrices = experts.need(layer, active[layer])
            if layer:
                experts.prefetch(layer - 1, active[layer - 1])
            chosen, pull = passed.pop()
            above = (pull, d_x)
            gradient = run.back(weights, jnp.int32(layer), chosen, inputs, matrices, above)
            experts.put_gradient(layer, active[layer], gradient.experts)
            d_x = gradient.x
            blocks.append(BlockParts(gradient.parameters, gradient.square, chosen.stats))
            # Nothing here may keep a layer's matrices or residuals alive into the next turn.
            del chosen, pull, above, gradient, matrices
        begun = run.begin_back(pull_begin, d_x)
        updated = run.finish(state, ended, begun, tuple(reversed(blocks)))
        # The norm is known only now, so experts are clipped when they are next brought.
        norm = float(updated.metrics.gradient_norm)
        experts.end_update(active, bool(updated.finite), norm)
        # The loop reads an update's line while the next one runs: a few are kept.
        step = int(updated.state.step)
        self.lines = {step: experts.traffic()} | dict(list(self.lines.items())[-3:])
        return updated.state, updated.metrics

    def compile(self, state: TrainState, batch: Any) -> None:
        """Compiles every program of an update for batches of this form, by running it on zeros.

        `batch` may be abstract. The run changes neither state nor experts.
        """
        run = self._programs
        batch = jax.tree.map(
            lambda row: jnp.zeros(row.shape, row.dtype, device=row.sharding), batch
        )
        # A copy, because `finish` uses its state up.
        state = jax.tree.map(jnp.copy, state)
        at = jnp.int32(0)
        shapes = self.experts.shapes.parameters
        number = self.experts.sizes.experts
        matrices = tuple(jnp.zeros((number, *s.shape), s.dtype) for s in shapes)
        weights = Weights(state.parameters, state.router)
        inputs = Inputs(batch, state.step_key())
        x, pull_begin = run.begin(weights, inputs)
        chosen, pull = run.enter(weights, at, x, inputs)
        x = run.leave(weights, at, chosen, inputs, matrices)
        ended = run.end(weights, x, inputs)
        above = (pull, ended.x)
        gradient = run.back(weights, at, without_stream(chosen), inputs, matrices, above)
        begun = run.begin_back(pull_begin, gradient.x)
        block = BlockParts(gradient.parameters, gradient.square, chosen.stats)
        jax.block_until_ready(run.finish(state, ended, begun, (block,) * self.layers))

    def evaluator(
        self, validation: TokenArray, place: Callable[[Batch], Batch]
    ) -> Callable[[TrainState], float]:
        """As evaluate.make_evaluator."""

        def evaluate(state: TrainState) -> float:
            weights = Weights(state.parameters, state.router)
            nats: list[float] = []
            remaining = map(place, held_out_batches(self.config, validation))
            while group := list(islice(remaining, GROUP)):
                nats += self._nats(weights, group)
            return bits_per_byte(nats, validation)

        return evaluate

    def _nats(self, weights: Weights, batches: list[Batch]) -> list[float]:
        run = self._programs
        inputs = [Inputs(batch, None) for batch in batches]
        streams = [run.begin_only(weights, each) for each in inputs]
        for layer in range(self.layers):
            at = jnp.int32(layer)
            pairs = list(zip(streams, inputs, strict=True))
            chosen = [(run.enter_only(weights, at, x, each), each) for x, each in pairs]
            used = np.unique(np.concatenate([_active(c.stats) for c, _ in chosen]))
            matrices = self.experts.need(layer, used)
            self.experts.prefetch(layer + 1)
            streams = [run.leave(weights, at, c, each, matrices) for c, each in chosen]
        pairs = zip(streams, batches, strict=True)
        return [float(run.nats(weights, x, batch)) for x, batch in pairs]


def _active(stats: RouterStats) -> Int[np.ndarray, "n"]:
    """The experts that some token chose."""
    return np.flatnonzero(np.asarray(stats.load))
