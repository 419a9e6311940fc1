"""The plain engine: one program over a mesh, state and batches laid out by parallel.rules."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.machine import available_bytes
from moe_jax.config import TrainConfig
from moe_jax.data.tokens import TokenArray
from moe_jax.model.layout import shardings
from moe_jax.objectives.base import Batch, Objective
from moe_jax.parallel.mesh import batch_parts, make_mesh
from moe_jax.parallel.rows import global_batch, place_whole, rows_of_process
from moe_jax.parallel.rules import batch_sharding, device_bytes, replicated, with_sharding
from moe_jax.train.activations import say_if_too_large
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.state import Metrics, TrainState, abstract_state, init_state, tree_bytes
from moe_jax.train.step import make_step


class DenseEngine:
    """train.engine.Engine for a state that fits the devices. Its step is make_step's function."""

    described = "without placement.device_budget"

    def __init__(self, config: TrainConfig, devices: Sequence[Any] | None = None) -> None:
        """Uses these devices. Unset, all of them. UserError: config.parallel does not fill them."""
        self.config = config
        self.mesh = make_mesh(config.parallel, devices)

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        return True

    def check(self) -> None:
        """The state must have a layout, and every micro-batch must split evenly over devices."""
        self.abstract_state()
        devices = batch_parts(self.mesh)
        parts = self.config.optim.accumulation
        if self.config.batch // parts % devices:
            raise UserError(
                f"batch={self.config.batch} in optim.accumulation={parts} parts does not divide "
                f"over {devices} devices: make batch a multiple of {devices * parts}"
            )

    def memory_bytes(self) -> int:
        return device_bytes(self.abstract_state())

    def disk_bytes(self, out: Path) -> dict[Path, int]:
        return {}

    def abstract_state(self) -> TrainState:
        state = abstract_state(self.config)
        return with_sharding(state, shardings(self.mesh, state))

    def start(self, out: Path) -> TrainState:
        # Initialised with its sharding, so that it is never whole on one device first.
        return jax.jit(lambda: init_state(self.config), out_shardings=self._shardings())()

    def resume(self, out: Path, state: TrainState, checkpoint: Path) -> TrainState:
        return state

    def rows(self) -> np.ndarray:
        return rows_of_process(batch_sharding(self.mesh), self.config.batch)

    def place(self, batch: Batch) -> Batch:
        return global_batch(batch_sharding(self.mesh), self.config.batch, self.rows(), batch)

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
        # Laid out like the state: operands may have been loaded on one device.
        self._operands = place_whole(operands, shardings(self.mesh, operands))
        # Ahead of time and from shapes alone, so that compiling is timed apart from the first step.
        self._step = self.lower(batch, objective, self._operands).compile()
        say_if_too_large(self._step)
        self._evaluate = make_evaluator(self.config, validation, self.place, self.rows())

    def lower(
        self, batch: Batch, objective: Objective, operands: tuple[Any, ...] = ()
    ) -> jax.stages.Lowered:
        """The step as a program that is not compiled yet. The devices need not be there."""
        # The layout of the result is that of the argument, which is donated.
        results = (self._shardings(), replicated(self.mesh))
        step = jax.jit(self.make_step(objective), donate_argnums=0, out_shardings=results)
        return step.lower(self.abstract_state(), batch, *operands)

    def make_step(self, objective: Objective) -> Callable[..., tuple[TrainState, Metrics]]:
        """The function that `compile` compiles."""
        return make_step(self.config, objective)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._step(state, batch, *self._operands)

    def evaluate(self, state: TrainState) -> float:
        return self._evaluate(state)

    def step_line(self, step: int) -> dict[str, Any]:
        return {}

    def save_beside(self, out: Path, step: int) -> Path | None:
        return None

    def local_state(self, state: TrainState) -> TrainState | None:
        """The parameters and router biases. Nothing that samples reads the moments."""
        own = state._replace(optimizer=())
        size = tree_bytes(own)
        available = least_of_all(available_bytes())
        if self.mesh.size > 1 and available is not None and size > available:
            say(f"no samples: one device has no room for the model's {size / 1e9:,.1f} GB")
            return None
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(self.mesh))(own)
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)

    def load(self, state: TrainState, checkpoint: Path) -> TrainState:
        return state

    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

    def close(self) -> None:
        pass


def least_of_all(number: int | None) -> int | None:
    """The least of all processes' numbers, in each of them, so that they decide alike.

    None: a process has none.
    """
    if jax.process_count() == 1:
        return number
    # As float64 on the host: a device's integers have 32 bits.
    parts = np.frombuffer(np.float64(-1 if number is None else number).tobytes(), np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(parts))
    least = int(np.frombuffer(gathered.tobytes(), np.float64).min())
    return None if least < 0 else least
