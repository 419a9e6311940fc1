"""The device memory of training with tiers: how a budget is spent, resident chunks, and programs.

Rows are brought up to date a chunk at a time by one program, on the device or from below. A program
for another number of rows would round differently, because XLA's vectorised power differs from the
scalar one in the last bit. Results would then depend on the budget.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int

from moe_jax.config import PlacementConfig, TrainConfig, require
from moe_jax.model.trunk import Matrices
from moe_jax.train.engines.tiered.rows import RowShapes, make_advance

KINDS = ("parameters", "moments", "gradients")


class Sizes:
    """How a device budget is spent. UserError: it is below one layer's working set."""

    def __init__(self, config: TrainConfig, shapes: RowShapes) -> None:
        self.layers = config.model.moe_layers
        self.experts = config.model.moe.experts
        self.chunk = max(1, self.experts // 16)
        """Experts that are brought up to date together. Small beside a layer, so that chunks on
        their way cost little memory."""
        own = shapes.parameter_bytes
        record = shapes.record_bytes
        # Two layer buffers and two layers' gradients (one in use, and one being read or written),
        # and two chunks on their way in and out.
        layers = 4 * self.experts * own
        # A chunk comes in as a whole record, and goes out without its gradient.
        self.working = layers + 2 * self.chunk * (2 * record - own)
        budget = config.placement.device_bytes
        require(
            budget >= self.working,
            f"placement.device_budget={config.placement.device_budget} is below one layer's "
            f"working set: {self.experts} experts of {own} bytes (two layers' matrices and "
            f"gradients, and {2 * self.chunk} whole records on their way) need at least "
            f"{self.working} bytes",
        )
        chunks = (budget - self.working) // (self.chunk * record) // self.layers
        self.quota = min(self.experts, chunks * self.chunk)
        """Residents in each layer."""
        # Counted again: the quota may be cut at E, with a last chunk that is partly filled.
        chunks = -(-self.quota // self.chunk)
        self.device = self.working + self.layers * chunks * self.chunk * record
        """Bytes of the budget that are used."""
        self.host = config.placement.host_bytes // record
        """Experts that host memory holds."""


@dataclass(eq=False)
class ResidentChunk:
    """Residents of one layer, [chunk, …]. Rows beyond the last resident hold any values."""

    ids: Int[np.ndarray, "n"]
    rows: dict[str, Matrices]
    """By kind."""


class Residents:
    """The experts of one layer that stay on the device, in ascending order."""

    def __init__(self, ids: Int[np.ndarray, "R"], chunk: int, shapes: RowShapes) -> None:
        def zeros(kind: str) -> Matrices:
            return tuple(jnp.zeros((chunk, *s.shape), s.dtype) for s in shapes.of(kind))

        self.ids = ids
        self.chunk = chunk
        self.chunks = [
            ResidentChunk(ids[begin : begin + chunk], {kind: zeros(kind) for kind in KINDS})
            for begin in range(0, len(ids), chunk)
        ]

    def load(self, kind: str, arrays: list[np.ndarray]) -> None:
        """Replaces the rows of a kind, [R, …] each."""
        for index, chunk in enumerate(self.chunks):
            own = slice(index * self.chunk, index * self.chunk + len(chunk.ids))
            chunk.rows[kind] = tuple(jnp.asarray(padded(a[own], self.chunk)) for a in arrays)

    def on_host(self, kind: str) -> list[np.ndarray]:
        """The rows of a kind, [R, …] each."""
        parts = [[np.asarray(m)[: len(c.ids)] for m in c.rows[kind]] for c in self.chunks]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]


class Programs:
    """The jitted functions on rows."""

    def __init__(self, config: TrainConfig) -> None:
        self.advance = jax.jit(make_advance(config))
        self.take = jax.jit(lambda rows, ids: tuple(part[ids] for part in rows))
        self.place = jax.jit(_place, donate_argnums=0)


def programs_of(config: TrainConfig) -> Programs:
    """The programs of a config, shared by all runs that differ only in their placement."""
    # Neutral placement and folder: they are no part of the programs, and would only miss the cache.
    return _programs(replace(config, placement=PlacementConfig(), out=""))


@lru_cache(maxsize=4)
def _programs(config: TrainConfig) -> Programs:
    return Programs(config)


def _place(
    buffer: Matrices, rows: Matrices, places: Int[Array, "n"], count: Int[Array, ""]
) -> Matrices:
    """buffer[places[i]] = rows[i] for i < count."""

    # A loop and no scatter: padding repeats place 0, and a scatter would write there as well.
    def body(i: Array, buffer: Matrices) -> Matrices:
        pairs = zip(buffer, rows, strict=True)
        return tuple(lax.dynamic_update_index_in_dim(b, r[i], places[i], 0) for b, r in pairs)

    return lax.fori_loop(0, count, body, buffer)


def padded(part: np.ndarray, size: int) -> np.ndarray:
    """`part` and zeros, `size` rows."""
    return np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
