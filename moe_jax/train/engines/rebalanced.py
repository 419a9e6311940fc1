"""The engine of runs that place experts on devices by load (parallel.exchange.rebalance)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.base.files import patiently, write_atomically
from moe_jax.base.scratch import make_scratch
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import merge_with_slots
from moe_jax.model.layout import shardings
from moe_jax.objectives.base import Objective
from moe_jax.parallel.rows import place_whole
from moe_jax.parallel.rules import replicated
from moe_jax.placement.slots import SlotPlanner
from moe_jax.train.checkpoint import EXPERTS, unfinished_folder
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.state import Metrics, TrainState
from moe_jax.train.step import make_gradient, make_step

SLOTS = "slots.json"
"""File of a checkpoint's folder EXPERTS."""
ByPart = dict[str, np.ndarray]
"""An array [layers, …] of each part of the model that has experts ("sparse", "mtp")."""


class RebalancedEngine(DenseEngine):
    """DenseEngine whose experts are placed anew every `rebalance` steps, hot ones several times.

    State and checkpoints hold every expert once, in order. On devices of the axis `expert` each
    device has a part of every expert, and fetches its slots' matrices in each layer
    (parallel.fetch). So a new placement changes an operand of the step: nothing is compiled, and no
    state moves. Evaluation has no replicas.
    """

    def __init__(self, config: TrainConfig, devices: Sequence[Any] | None = None) -> None:
        super().__init__(config, devices)
        model = config.model
        self._every = config.parallel.exchange.rebalance
        self._planner = SlotPlanner.of(model.moe, config.parallel)
        layers = {"sparse": model.moe_layers, "mtp": model.mtp_depth}
        self._layers = {part: number for part, number in layers.items() if number}
        self.slots: ByPart = {p: self._planner.first(n) for p, n in self._layers.items()}
        self._loads = self._no_loads()
        self._unread: dict[int, Any] = {}  # loads by step, perhaps not computed yet
        self._moved: dict[int, int] = {}
        self._step_number = 0
        self._on_devices: Any = None

    @staticmethod
    def applies(config: TrainConfig) -> bool:
        return config.parallel.exchange.rebalance > 0

    def layout(self, tree: Any) -> Any:
        return shardings(self.mesh, tree, whole_experts=False)

    def make_step(self, objective: Objective) -> Callable[..., tuple[TrainState, Metrics]]:
        config = self.config

        def step(state: TrainState, batch: Any, slots: Any, *operands: Any) -> Any:
            def merge(parameters: Any, router: Any) -> Any:
                return merge_with_slots(config.model, slots, parameters, router)

            gradient = make_gradient(config, objective, merge)
            return make_step(config, objective, gradient)(state, batch, *operands)

        return step

    def inputs(self) -> tuple[Any, ...]:
        if self._on_devices is None:
            slots = {part: own.astype(np.int32) for part, own in self.slots.items()}
            self._on_devices = place_whole(
                slots, jax.tree.map(lambda _: replicated(self.mesh), slots)
            )
        return (self._on_devices,)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """One update, and after every `rebalance` of them a new placement by their loads."""
        state, metrics = super().step(state, batch)
        self._step_number += 1
        self._unread[self._step_number] = {p: metrics.stats[p].load for p in self._layers}
        if self._step_number % self._every == 0:
            self._rebalance()
        return state, metrics

    def step_line(self, step: int) -> dict[str, Any]:
        """`experts_moved`: those that came to another device after this step, in all layers."""
        self._read(step)
        return {"experts_moved": self._moved.pop(step)} if step in self._moved else {}

    def save_beside(self, out: Path, step: int) -> Path | None:
        """The placement, and the loads since it was made."""
        self._read(step)
        if jax.process_index() != 0:
            return None
        folder = make_scratch(unfinished_folder(out)) / f"slots-{step}"
        folder.mkdir(exist_ok=True)
        saved = {"slots": self.slots, "loads": self._loads}
        lists = jax.tree.map(lambda array: array.tolist(), saved)
        lists["planner"] = self._planner.described
        write_atomically(folder / SLOTS, json.dumps(lists))
        return folder

    def resume(self, out: Path, state: TrainState, checkpoint: Path) -> TrainState:
        """The placement is the checkpoint's if its devices, nodes and slots are these."""
        self._step_number = int(state.step)
        path = checkpoint / EXPERTS / SLOTS
        if path.exists():
            saved = json.loads(patiently(path.read_bytes))
            self._loads = {part: np.array(saved["loads"][part]) for part in self._layers}
            if saved["planner"] == self._planner.described:
                self.slots = {part: np.array(saved["slots"][part]) for part in self._layers}
        return super().resume(out, state, checkpoint)

    def _rebalance(self) -> None:
        self._read(self._step_number)
        before = self.slots
        self.slots = {p: self._planner.next(self._loads[p], before[p]) for p in self._layers}
        moved = (self._planner.moved(before[p], self.slots[p]) for p in self._layers)
        self._moved[self._step_number] = sum(moved)
        self._loads = self._no_loads()
        self._on_devices = None

    def _read(self, until: int) -> None:
        """Adds up the loads of the steps up to this one. It waits until they are computed."""
        for step in [step for step in self._unread if step <= until]:
            for part, load in self._unread.pop(step).items():
                self._loads[part] = self._loads[part] + np.asarray(load)

    def _no_loads(self) -> ByPart:
        experts = self.config.model.moe.experts
        return {part: np.zeros((n, experts), np.int64) for part, n in self._layers.items()}
