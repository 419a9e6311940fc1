"""Training of the byte-level arms: a dense teacher for each seed, its students, their controls.

This file and smollm2_lab.py are the only ones of the folder that build training steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.distillation import traits
from experiments.distillation.arms import (
    ARMS,
    CACHES,
    PROMPT,
    Arm,
    Settings,
    arm_config,
    plan,
    teacher_config,
)
from experiments.distillation.curves import (
    Curve,
    Curves,
    curve_summary,
    curves_of,
    train_curve,
)
from moe_jax.base.seeds import SEEDS
from moe_jax.config import TrainConfig, require
from moe_jax.data.batches import train_batches
from moe_jax.data.tokens import TokenData
from moe_jax.distill.teacher import Teacher
from moe_jax.distill.upcycle import upcycle
from moe_jax.objectives.distillation import (
    DistillConfig,
    cached_objective,
    is_on_policy,
    online_objective,
    own_batch,
    text_batch,
)
from moe_jax.study.arms import RunStore, run_arms
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.state import TrainState, init_state
from moe_jax.train.step import make_step

TEACHER_TEXT = 1000
"""Added to a seed for its teacher's batches. The teacher reads other text than its students, who
learn its knowledge of the language and not the order of its batches."""


def distillation(arm: Arm) -> DistillConfig:
    """The objective of the arm's student."""
    return DistillConfig(alpha=arm.alpha, chunk=256, on_policy=arm.on_policy, prompt=PROMPT)


@dataclass
class Lab:
    """Trains arms. A step is compiled once for all seeds, and for the arms that share it."""

    settings: Settings
    data: TokenData
    folder: Path
    _teachers: dict[int, TrainState] = field(default_factory=dict)
    _steps: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _evaluators: dict[Any, Callable[..., float]] = field(default_factory=dict)

    def curves(self) -> Curves:
        """Every arm with each of its seeds, from the folder where they are finished."""
        # The two numbers of updates are all that a caller can change about a run.
        store = RunStore(self.folder, (self.settings.steps, self.settings.teacher_steps))

        def run_one(arm: str, seed: int) -> dict[str, Any]:
            return self.train(arm, seed)[0]._asdict()

        runs = run_arms(store, plan(self.settings), run_one, summary=curve_summary)
        return curves_of(runs)

    def teacher(self, seed: int) -> Teacher:
        """Trained again after a restart, which costs seconds and gives the same bits."""
        if seed not in self._teachers:
            self.train("teacher", seed)
        state = self._teachers[seed]
        model = teacher_config().model
        return Teacher(model, state.parameters, state.router, self.data.tokenizer)

    def train(self, name: str, seed: int) -> tuple[Curve, TrainState]:
        """A run of an arm."""
        arm = ARMS[name]
        config = replace(arm_config(name, self.settings), seed=seed)
        step = self._step(arm, config)
        operands = [[self.teacher(seed)[1:3]]] if arm.online else []

        def update(state: TrainState, batch: Any, index: int) -> TrainState:
            if arm.online:
                batch = self._read_or_written(arm, config, state, batch, index)
            return step(state, batch, *operands)[0]

        order = (seed + TEACHER_TEXT) % SEEDS if name == "teacher" else seed
        batches = self._batches(arm, config, order)
        start = self._start(arm, config)
        curve, state = train_curve(config, start, update, batches, self._evaluator(config))
        finite = bool(np.isfinite(curve.bits[-1]))
        require(finite, f"{name}, seed {seed}: the loss is not finite")
        if name == "teacher":
            # Only one is kept: seeds are the outer loop of run_arms.
            self._teachers = {seed: state}
        return curve._replace(traits=self._traits(arm, config, state)), state

    def _step(self, arm: Arm, config: TrainConfig) -> Callable[..., Any]:
        """The update: step(state, batch), and the teachers' states as a third argument online."""
        key = replace(config, seed=0), arm.alpha, arm.teaching
        if key not in self._steps:
            objective: Any = ()
            if arm.online:
                teachers = [teacher_config().model]
                objective = (online_objective(distillation(arm), teachers),)
            elif arm.alpha:
                objective = (cached_objective(distillation(arm)),)
            self._steps[key] = jax.jit(make_step(config, *objective))
        return self._steps[key]

    def _evaluator(self, config: TrainConfig) -> Callable[..., float]:
        plain = replace(config.model, dropout=0.0)
        if plain not in self._evaluators:
            evaluator = make_evaluator(config, self.data.validation, lambda batch: batch)
            self._evaluators[plain] = evaluator
        return self._evaluators[plain]

    def _start(self, arm: Arm, config: TrainConfig) -> TrainState:
        """A fresh state, or one with the teacher's parameters and a fresh optimizer."""
        state = init_state(config)
        if arm.start == "random":
            return state
        teacher = self.teacher(config.seed)
        parameters = teacher.parameters
        router = state.router
        if arm.start == "upcycled":
            _, parameters, router = upcycle(teacher.model, parameters, arm.upcycle)
        optimizer = make_optimizer(config.optim, config.steps).init(parameters)
        return state._replace(parameters=parameters, router=router, optimizer=optimizer)

    def _batches(self, arm: Arm, config: TrainConfig, seed: int) -> Iterator[Any]:
        batches = train_batches(self.data.train, config.data.length, config.batch, seed)
        if arm.alpha and not arm.online:
            read = [next(batches) for _ in range(config.steps)]
            cache = CACHES[arm.teaching]
            return traits.with_cache(read, self.teacher(seed), cache, self.folder)
        return iter(batches)

    def _read_or_written(
        self, arm: Arm, config: TrainConfig, state: TrainState, batch: Any, index: int
    ) -> Any:
        """The batch, or the student's own text in its place."""
        settings = distillation(arm)
        if not is_on_policy(settings, config.seed, index):
            return text_batch(batch)
        model = config.model
        return own_batch(
            settings,
            model,
            state.model_states(),
            batch,
            state.step_key(),
            vocabulary=self.data.tokenizer.vocabulary,
            end=self.data.tokenizer.eos,
        )

    def _traits(self, arm: Arm, config: TrainConfig, state: TrainState) -> dict[str, Any]:
        if not arm.examined:
            return {}
        model = config.model
        student = (state.parameters, state.router)
        found = traits.of_experts(model, student)
        if arm.alpha:
            teacher = self.teacher(config.seed)
            text = self.data.validation
            found |= traits.of_own_text(model, student, teacher, text, config.batch)
        return found
