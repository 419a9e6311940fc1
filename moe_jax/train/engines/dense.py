"""The plain engine: the whole state on every device, batches split over devices."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.base.errors import UserError
from moe_jax.config import TrainConfig
from moe_jax.data.tokens import TokenArray
from moe_jax.objectives.base import Batch, Objective
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import batch_sharding, replicated, with_sharding
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.state import Metrics, TrainState, abstract_state, init_state, tree_bytes
from moe_jax.train.step import make_step


class DenseEngine:
    """train.engine.Engine for a state that fits each device. Its step is make_step's function."""

    described = "without placement.device_budget"

    def __init__(self, config: TrainConfig, devices: int | None = None) -> None:
        """Uses the first `devices` devices. Unset, all of them."""
        self.config = config
        self.mesh = make_mesh(devices)
        self._sharding = replicated(self.mesh)

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        return True

    def check(self) -> None:
        """Every micro-batch must split evenly over the devices."""
        devices = self.mesh.size
        parts = self.config.optim.accumulation
        if self.config.batch // parts % devices:
            raise UserError(
                f"batch={self.config.batch} in optim.accumulation={parts} parts does not divide "
                f"over {devices} devices: make batch a multiple of {devices * parts}"
            )

    def memory_bytes(self) -> int:
        return tree_bytes(abstract_state(self.config))

    def disk_bytes(self, out: Path) -> dict[Path, int]:
        return {}

    def abstract_state(self) -> TrainState:
        return with_sharding(abstract_state(self.config), self._sharding)

    def start(self, out: Path) -> TrainState:
        # Initialised with its sharding, so that it is never whole on one device first.
        return jax.jit(lambda: init_state(self.config), out_shardings=self._sharding)()

    def resume(self, out: Path, state: TrainState, checkpoint: Path) -> TrainState:
        return state

    def place(self, batch: Batch) -> Batch:
        # Every process reads its own rows (data.batches), which together are the global batch.
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
        )

    def abstract_batch(self) -> Batch:
        config = self.config
        shape = (config.batch, config.data.length + 1 + config.model.mtp_depth)
        row: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.mesh))
        return {"tokens": row, "segments": row}

    def compile(
        self,
        state: TrainState,
        batch: Batch,
        objective: Objective,
        operands: tuple[Any, ...],
        validation: TokenArray,
    ) -> None:
        # Copies on every device, like the state: operands may have been loaded on one.
        self._operands = jax.device_put(operands, self._sharding)
        step = jax.jit(make_step(self.config, objective), donate_argnums=0)
        # Ahead of time and from shapes alone, so that compiling is timed apart from the first step.
        lowered = step.lower(self.abstract_state(), batch, *self._operands)
        self._step = lowered.compile()
        self._evaluate = make_evaluator(self.config, validation, self.place)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._step(state, batch, *self._operands)

    def evaluate(self, state: TrainState) -> float:
        return self._evaluate(state)

    def step_line(self, step: int) -> dict[str, Any]:
        return {}

    def save_beside(self, out: Path, step: int) -> Path | None:
        return None

    def local_state(self, state: TrainState) -> TrainState | None:
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)  # it is replicated

    def load(self, state: TrainState, checkpoint: Path) -> TrainState:
        return state

    def close(self) -> None:
        pass
