"""One update, and an evaluation, of a model whose experts live in tiers: a loop over its layers.

The same mathematics as step.make_step, in the programs of tier_programs; between them the host
brings experts.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.data.batches import validation_batches
from moe_jax.data.tokens import TokenArray
from moe_jax.moe.layer import RouterStats
from moe_jax.objectives.next_token import Batch
from moe_jax.train.engines.tiered.programs import programs_of
from moe_jax.train.engines.tiered.store import TieredExperts
from moe_jax.train.step import Metrics, TrainState

GROUP = 8
"""Validation batches that go through a layer before the next one: its experts come once for all."""


class TieredStep:
    """(state, batch) -> (state, metrics), as make_step's function; the state is the trunk's."""

    def __init__(self, config: TrainConfig, experts: TieredExperts) -> None:
        self.config, self.experts = config, experts
        self.layers = config.model.moe_layers
        self._programs = programs_of(config)
        self.lines: dict[int, dict[str, Any]] = {}
        """What an update moved, by its number, for metrics.jsonl."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        run, held = self._programs, self.experts
        held.prefetch(0)
        model = state.parameters, state.router
        key = run.key(state)
        x, pull = run.begin(*model, batch, key)
        entries, pulls, active = [], [], []
        for layer in range(self.layers):
            at = jnp.int32(layer)
            (middle, entered), back = run.enter(*model, at, x, batch, key)
            active.append(_active(entered.stats))
            slab = held.need(layer, active[-1])
            held.prefetch(layer + 1)
            x = run.leave(*model, at, middle, entered, batch, key, slab)
            entries.append(entered)
            pulls.append(back)
        ended = run.end(*model, x, batch, key)
        parts, squares, stats, d_x = [], [], [None] * self.layers, ended.x
        for layer in reversed(range(self.layers)):
            slab = held.need(layer, active[layer])
            if layer:
                held.prefetch(layer - 1, active[layer - 1])
            at, entered = jnp.int32(layer), entries[layer]
            backed = run.back(*model, at, entered, batch, key, slab, pulls.pop(), d_x)
            held.put_gradient(layer, active[layer], backed.experts)
            d_x = backed.x
            parts.append(backed.block)
            squares.append(backed.square)
            stats[layer] = entered.stats
            del backed, slab, entered
            entries.pop()
        first, parts, squares = run.begin_back(pull, d_x), tuple(parts[::-1]), tuple(squares[::-1])
        new, metrics, finite = run.finish(state, ended, first, parts, squares, tuple(stats))
        held.end_update(active, bool(finite), float(metrics.gradient_norm))
        self.lines = {int(new.step): held.traffic()} | dict(list(self.lines.items())[-3:])
        return new, metrics

    def compile(self, state: TrainState, batch: Any) -> float:
        """Compiles every program of an update for the form of `batch` (abstract or not), on zeros,
        which changes nothing; seconds taken."""
        begin, run = time.perf_counter(), self._programs
        batch = jax.tree.map(
            lambda row: jnp.zeros(row.shape, row.dtype, device=row.sharding), batch
        )
        state, at = jax.tree.map(jnp.copy, state), jnp.int32(0)
        shapes, experts = self.experts.shapes.parameters, self.experts.sizes.experts
        slab = tuple(jnp.zeros((experts, *s.shape), s.dtype) for s in shapes)
        model, key = (state.parameters, state.router), run.key(state)
        x, pull = run.begin(*model, batch, key)
        (x, entered), back = run.enter(*model, at, x, batch, key)
        x = run.leave(*model, at, x, entered, batch, key, slab)
        ended = run.end(*model, x, batch, key)
        backed = run.back(*model, at, entered, batch, key, slab, back, ended.x)
        each = self.layers
        first, parts = run.begin_back(pull, backed.x), (backed.block,) * each
        squares, stats = (backed.square,) * each, (entered.stats,) * each
        done = run.finish(state, ended, first, parts, squares, stats)
        jax.block_until_ready(done)
        return time.perf_counter() - begin

    def evaluator(
        self, validation: TokenArray, place: Callable[[Batch], Batch]
    ) -> Callable[[TrainState], float]:
        """As evaluate.make_evaluator."""
        config = self.config

        def batches() -> Iterator[Any]:
            return validation_batches(validation, config.data.length, config.batch)

        def evaluate(state: TrainState) -> float:
            nats: list[float] = []
            remaining = batches()
            while group := [place(batch) for batch in islice(remaining, GROUP)]:
                nats += self._nats(state, group)
            return math.fsum(nats) / math.log(2) / validation.bytes

        return evaluate

    def _nats(self, state: TrainState, batches: list[Batch]) -> list[float]:
        run, held, model = self._programs, self.experts, (state.parameters, state.router)
        xs = [run.begin_only(*model, batch) for batch in batches]
        for layer in range(self.layers):
            at, pairs = jnp.int32(layer), list(zip(xs, batches, strict=True))
            found = [(*run.enter_only(*model, at, x, batch), batch) for x, batch in pairs]
            used = np.unique(np.concatenate([_active(e.stats) for _, e, _ in found]))
            slab = held.need(layer, used)
            held.prefetch(layer + 1)
            xs = [run.leave(*model, at, x, e, batch, None, slab) for x, e, batch in found]
        return [float(run.nats(*model, x, b)) for x, b in zip(xs, batches, strict=True)]


def _active(stats: RouterStats) -> Int[np.ndarray, "n"]:
    """The experts that some token chose."""
    return np.flatnonzero(np.asarray(stats.load))
