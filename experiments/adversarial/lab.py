"""Training and reading for the parts of the adversarial experiment.

This is the only file of the folder that builds training steps from moe_jax.train, but for the
discriminator's (generative_students.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.adversarial.settings import LENGTH, Scale, run_config, teacher_config
from experiments.adversarial.text import Text, batch_of, shuffled_batches, windows_of
from moe_jax.config import ModelConfig, TrainConfig
from moe_jax.model.abstract import abstract_states, graph_of
from moe_jax.objectives.adversarial import sequence_nats
from moe_jax.objectives.base import Objective
from moe_jax.objectives.distillation import States
from moe_jax.objectives.next_token import next_token
from moe_jax.study.arms import RunStore
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState, init_state
from moe_jax.train.step import make_step

READ_ROWS = 160
"""Windows that are read at once. The number is fixed, so that reading is compiled once."""


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    name: str
    """Stands for the objective: steps are compiled once for each name and model."""
    objective: Objective = next_token
    operands: tuple[Any, ...] = ()
    """Arguments of the step after the batch, such as the teacher's (parameters, router)."""


PLAIN = Method("plain")


@dataclass
class Lab:
    """One experiment's folder, text and teacher, and the programs that it has compiled."""

    out: Path
    scale: Scale
    _programs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _starts: dict[Any, TrainState] = field(default_factory=dict)

    @cached_property
    def store(self) -> RunStore:
        """The finished runs, in DIR/runs."""
        return RunStore(self.out / "runs", self.scale)

    @cached_property
    def text(self) -> Text:
        return Text(self.out)

    @cached_property
    def held_out(self) -> dict[str, np.ndarray]:
        """The held-out windows of each domain."""
        return self.text.held_out(self.scale.held_out)

    def compiled(self, name: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """jit of build(), once a name."""
        if name not in self._programs:
            self._programs[name] = jax.jit(build())
        return self._programs[name]

    def start(self, model: ModelConfig, seed: int) -> TrainState:
        """A fresh state, the same for all arms of a seed."""
        same = replace(model, dropout=0.0)  # dropout has no parameters
        if (same, seed) not in self._starts:
            config = run_config(same, 1, seed)
            self._starts[same, seed] = jax.jit(lambda: init_state(config))()
        return self._starts[same, seed]

    def restart(self, config: TrainConfig, student: States) -> TrainState:
        """A trained student with a fresh optimizer and schedule."""
        parameters, router = student
        optimizer = make_optimizer(config.optim, config.steps).init(parameters)
        fresh = self.start(config.model, config.seed)
        return fresh._replace(parameters=parameters, router=router, optimizer=optimizer)

    def step(
        self, config: TrainConfig, method: Method = PLAIN
    ) -> Callable[..., tuple[TrainState, Any]]:
        """The update: step(state, batch, *method.operands) -> (state, metrics)."""
        key = method.name, replace(config, seed=0)
        return self.compiled(key, lambda: make_step(config, method.objective))

    def train(
        self,
        config: TrainConfig,
        batches: Iterator[Any],
        method: Method = PLAIN,
        state: TrainState | None = None,
    ) -> TrainState:
        """config.steps updates from `state`, or from the seed's fresh one.

        `batches` yields windows or whole batches.
        """
        step = self.step(config, method)
        state = state or self.start(config.model, config.seed)
        for _ in range(config.steps):
            rows = next(batches)
            batch = rows if isinstance(rows, dict) else batch_of(rows)
            state, _ = step(state, batch, *method.operands)
        return state

    def reader(self, model: ModelConfig) -> Callable[[States, Any], Any]:
        """reader(state, batch) -> float32[B], the mean nats a byte of each window."""
        graph = graph_of(model)

        def build() -> Callable[..., Any]:
            return lambda state, batch: sequence_nats(nnx.merge(graph, *state), batch, LENGTH)

        return self.compiled(("nats", replace(model, dropout=0.0)), build)

    def nats(self, model: ModelConfig, state: States, windows: np.ndarray) -> np.ndarray:
        """Mean nats a byte of each window, for any number of windows."""
        read = self.reader(model)
        padding = np.repeat(windows[:1], -len(windows) % READ_ROWS, axis=0)
        padded = np.concatenate([windows, padding])
        starts = range(0, len(padded), READ_ROWS)
        parts = [read(state, batch_of(padded[i : i + READ_ROWS])) for i in starts]
        return np.concatenate([np.asarray(p) for p in parts])[: len(windows)]

    def bits(self, model: ModelConfig, state: States) -> dict[str, float]:
        """Bits per byte of the held-out text: each domain, and `bits`, the mean of the domains."""
        of_domain = {
            domain: float(self.nats(model, state, windows).mean() / math.log(2))
            for domain, windows in self.held_out.items()
        }
        return {"bits": float(np.mean(list(of_domain.values()))), **of_domain}

    @cached_property
    def teacher_model(self) -> ModelConfig:
        return teacher_config(self.scale.teacher_width)

    @cached_property
    def teacher(self) -> States:
        """The teacher of all seeds, trained on clean text that no student reads."""

        def train() -> States:
            documents, _ = self.text.draw("teacher", 3000, 0)
            config = run_config(self.teacher_model, self.scale.teacher_steps, learning_rate=3e-3)
            print(f"training the teacher, {config.steps} steps", flush=True)
            return self.train(config, shuffled_batches(windows_of(documents), 0)).model_states()

        return self.trained("teacher", self.teacher_model, train)

    def trained(self, name: str, model: ModelConfig, train: Callable[[], States]) -> States:
        """A model's (parameters, router), from DIR/runs if an earlier call has trained it."""
        structure = abstract_states(model)
        return self.store.arrays_once(name, structure, train)
