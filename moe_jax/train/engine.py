"""The interface of an engine, which keeps and updates the state of a run, to the train loop."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from moe_jax.config import TrainConfig
from moe_jax.data.tokens import TokenArray
from moe_jax.objectives.base import Batch, Objective
from moe_jax.train.state import Metrics, TrainState


class Engine(Protocol):
    """Lays out, initialises, updates, evaluates and saves the state of a run.

    The loop calls `check`, then either `start` or `resume`, then `compile`, then `step` and
    `evaluate` in turn, and `close` at the end. An engine of a new kind needs a class with these
    methods in train/engines/ and a line in engines.ENGINES.
    """

    config: TrainConfig
    mesh: Mesh
    described: str
    """The form of its checkpoints, for messages: `with …` or `without …`.

    Engines with the same words continue each other's runs."""

    def __init__(self, config: TrainConfig) -> None: ...

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        """Whether these settings ask for this engine."""
        ...

    def check(self) -> None:
        """UserError: settings that this engine cannot run. Nothing is allocated yet."""
        ...

    def memory_bytes(self) -> int:
        """Bytes of the state on each device."""
        ...

    def disk_bytes(self, out: Path) -> dict[Path, int]:
        """Bytes on disk, by folder, that the run needs besides its checkpoints."""
        ...

    def abstract_state(self) -> TrainState:
        """The state that checkpoints hold: shapes and dtypes, each with its sharding."""
        ...

    def start(self, out: Path) -> TrainState:
        """The state of a fresh run in the folder `out`."""
        ...

    def resume(self, out: Path, state: TrainState, checkpoint: Path) -> TrainState:
        """The state to go on with, from that of a checkpoint and the checkpoint's folder."""
        ...

    def rows(self) -> np.ndarray:
        """The rows of a global batch that this process reads, ascending."""
        ...

    def place(self, batch: Batch) -> Batch:
        """This process's rows of a batch as arrays on the mesh."""
        ...

    def abstract_batch(self) -> Batch:
        """Tokens and segments of a training batch: shapes and dtypes, with their sharding."""
        ...

    def compile(
        self,
        state: TrainState,
        batch: Batch,
        objective: Objective,
        operands: tuple[Any, ...],
        validation: TokenArray,
    ) -> None:
        """Compiles `step` for a batch of this form (abstract), and readies `evaluate`."""
        ...

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. The old state's arrays are used up."""
        ...

    def evaluate(self, state: TrainState) -> float:
        """Bits per byte on the held-out text."""
        ...

    def step_line(self, step: int) -> dict[str, Any]:
        """This engine's entries in a step's line of metrics."""
        ...

    def save_beside(self, out: Path, step: int) -> Path | None:
        """Writes the part of the state that the loop does not see to a folder on out's disk.

        The folder becomes a part of the checkpoint. None: there is no such part.
        """
        ...

    def local_state(self, state: TrainState) -> TrainState | None:
        """The whole state on this process's first device, for sampling. None: too large for it."""
        ...

    def load(self, state: TrainState, checkpoint: Path) -> TrainState:
        """The whole state in memory, from a restored `state` and the checkpoint's own folder."""
        ...

    def close(self) -> None:
        """Ends threads and removes scratch files."""
        ...
