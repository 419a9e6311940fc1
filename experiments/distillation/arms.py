"""The byte-level runs of lever_distillation: a dense teacher, its students, and their controls.

A run (an arm with a seed) is the unit of resuming: its curve is a file in DIR/arms.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import distillation_traits as traits
import jax
import numpy as np

from moe_jax.base.files import write_atomically
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from moe_jax.data.batches import train_batches
from moe_jax.data.tokens import TokenData
from moe_jax.distill.cache import CacheConfig
from moe_jax.distill.teacher import Teacher
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config, upcycle
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.distillation import (
    DistillConfig,
    cached_objective,
    is_on_policy,
    online_objective,
    own_batch,
    text_batch,
)
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.step import TrainState, init_state, make_step

UPCYCLE = UpcycleConfig(experts=4, experts_per_token=2, noise=0.01)
POINTS = 10
"""Evaluations of a run."""
PROMPT = 32
"""Bytes of text that a student continues, on-policy and to be judged."""
CACHES = {
    "sampled": CacheConfig("sampled", count=12, batch=16),
    "top_k": CacheConfig("top_k", count=5, batch=16),
}
"""About as many bytes a token each: 24 and 22."""


@dataclass(frozen=True)
class Settings:
    """Trains teachers and students in pairs and compares tokens, FLOPs and held-out bits."""

    out: str = "runs/lever_distillation"
    """Folder for result.json, plots and the finished arms."""
    seed: int = 0
    """The first seed."""
    seeds: int = 5
    """Seeds, one after the other from `seed`."""
    costly_seeds: int = 5
    """At most so many of them for the arms that write their own text."""
    steps: int = 300
    """Updates of a student."""
    teacher_steps: int = 600
    """Updates of a teacher, and of the dense student of its size."""
    smollm2_seeds: int = 5
    """At most so many of them for the route with SmolLM2; 0 leaves it out."""
    smollm2_tokens: int = 98_304
    """Tokens that SmolLM2 reads, and that its students are trained on, each once."""
    quick: bool = False
    """One seed, a few updates, one arm of a kind, and not SmolLM2 (its own script has --quick)."""

    def __post_init__(self) -> None:
        require(
            self.smollm2_tokens >= 256,
            f"smollm2_tokens is {self.smollm2_tokens}: one update needs 256",
        )
        for name in ("seeds", "costly_seeds", "steps", "teacher_steps"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}: it must be positive")
        require(
            self.smollm2_seeds >= 0,
            f"smollm2_seeds is {self.smollm2_seeds}: it must not be negative",
        )

    def all_seeds(self) -> list[int]:
        return [self.seed + index for index in range(self.seeds)]


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens."""

    start: Literal["random", "teacher", "upcycled"] = "random"
    sparse: bool = True
    alpha: float = 0.0
    """Share of the teacher in the loss."""
    length: Literal["student", "teacher", "equal FLOPs"] = "student"
    """Whose number of updates; or the FLOPs of teacher and student together."""
    dropout: float = 0.0
    teaching: Literal["online", "sampled", "top_k"] = "online"
    """Whole distributions, or what a cache keeps of them (CACHES)."""
    on_policy: float = 0.0
    """Fraction of the batches that the student writes itself."""
    upcycle: UpcycleConfig = UPCYCLE

    @property
    def traits(self) -> bool:
        """Whether its experts are examined, and its own text if it is taught."""
        return self.sparse and self.length == "student" and not self.dropout


ARMS = {
    "teacher": Arm(sparse=False, length="teacher"),
    "scratch": Arm(),
    "scratch_dropout": Arm(dropout=0.1),
    "scratch_equal_flops": Arm(length="equal FLOPs"),
    "continued": Arm(start="teacher", sparse=False),
    "upcycled": Arm(start="upcycled"),
    "upcycled_exact": Arm(start="upcycled", upcycle=replace(UPCYCLE, noise=0.0)),
    "upcycled_half_new": Arm(
        start="upcycled", upcycle=replace(UPCYCLE, noise=0.0, reinitialised=0.5)
    ),
    "kd": Arm(alpha=0.5),
    "kd_alone": Arm(alpha=1.0),
    "kd_sampled": Arm(alpha=0.5, teaching="sampled"),
    "kd_top_k": Arm(alpha=0.5, teaching="top_k"),
    "kd_on_policy": Arm(alpha=0.5, on_policy=0.5),
    "upcycled_kd": Arm(start="upcycled", alpha=0.5),
    "upcycled_kd_on_policy": Arm(start="upcycled", alpha=0.5, on_policy=0.5),
    "self_kd": Arm(sparse=False, alpha=0.5, length="teacher"),
}
QUICK = ("teacher", "scratch", "upcycled", "kd", "upcycled_kd_on_policy")
"""One arm of a kind: most of the time of --quick is compilation."""


class Curve(NamedTuple):
    """Held-out bits per byte after so many updates."""

    steps: list[int]
    bits: list[float]
    traits: dict[str, Any] = {}  # noqa: RUF012
    """distillation_traits of the trained student, if they were asked for."""


Curves = dict[str, list[Curve]]
"""For each arm, one for each seed."""


def arms_of(settings: Settings) -> list[str]:
    return list(QUICK if settings.quick else ARMS)


def seeds_of(name: str, settings: Settings) -> list[int]:
    """The seeds of an arm."""
    seeds = settings.all_seeds()
    return seeds[: settings.costly_seeds] if ARMS[name].on_policy else seeds


def teacher_config() -> TrainConfig:
    """A dense model of 0.2M parameters on bytes."""
    model = ModelConfig(
        width=64,
        layers=3,
        dense_layers=3,
        dense_hidden=192,
        attention=AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=16),
        moe=MoEConfig(experts=4, experts_per_token=2),
        init_std=0.06,
        unroll=3,
    )
    data = DataConfig(
        tokenizer="bytes", length=128, validation_fraction=0.03, validation_tokens=30_000
    )
    return TrainConfig(batch=16, model=model, data=data, optim=OptimConfig(learning_rate=3e-3))


def flops_per_token(arm: Arm, config: TrainConfig) -> float:
    """Of an update of the arm: a third of a teacher's update (its forward pass) included, and a
    third of its own where the student writes."""
    length, teacher = config.data.length, teacher_config()
    reading = train_flops_per_token(teacher.resolved_model(), length) / 3 if arm.alpha else 0.0
    own = train_flops_per_token(config.resolved_model(), length)
    return own * (1 + arm.on_policy / 3) + reading


def updates(arm: Arm, settings: Settings, config: TrainConfig) -> int:
    """How many updates an arm gets."""
    if arm.length != "equal FLOPs":
        return settings.steps if arm.length == "student" else settings.teacher_steps
    teacher = teacher_config()
    own = flops_per_token(arm, config)
    spent = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher)
    return round((spent + settings.steps * flops_per_token(Arm(alpha=1), config)) / own)


def arm_config(name: str, settings: Settings) -> TrainConfig:
    """The model and schedule of an arm."""
    arm, config = ARMS[name], teacher_config()
    model = sparse_config(config.model, UPCYCLE) if arm.sparse else config.model
    config = replace(config, model=replace(model, dropout=arm.dropout))
    steps = updates(arm, settings, config)
    return replace(config, steps=steps, evaluate_every=max(5, steps // POINTS))


def distillation(arm: Arm) -> DistillConfig:
    """What the arm's student is trained on."""
    return DistillConfig(alpha=arm.alpha, chunk=256, on_policy=arm.on_policy, prompt=PROMPT)


@dataclass
class Runner:
    """Trains arms; a step is compiled once for all seeds, and for the arms that share it."""

    settings: Settings
    data: TokenData
    folder: Path
    _teachers: dict[int, TrainState] = field(default_factory=dict)
    _steps: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    _evaluators: dict[Any, Callable[..., float]] = field(default_factory=dict)

    def curve(self, name: str, seed: int) -> Curve:
        """An arm's curve, read if it is there for the same number of updates."""
        path = self.folder / f"{name}-{seed}.json"
        steps = arm_config(name, self.settings).steps
        if path.exists():
            found = Curve(**json.loads(path.read_text()))
            if found.steps[-1] == steps and bool(found.traits) == ARMS[name].traits:
                return found
        found, _ = self._train(name, seed)
        write_atomically(path, json.dumps(found._asdict()) + "\n")
        print(
            f"seed {seed}  {name:22} {steps:5} updates  {found.bits[-1]:.4f} bits per byte",
            flush=True,
        )
        return found

    def teacher(self, seed: int) -> Teacher:
        """Trained again after a restart: that costs seconds, and gives the same bits."""
        if seed not in self._teachers:
            self._teachers = {seed: self._train("teacher", seed)[1]}
        state = self._teachers[seed]
        model = teacher_config().resolved_model()
        return Teacher(model, state.parameters, state.router, self.data.tokenizer)

    def _programs(self, arm: Arm, config: TrainConfig) -> Any:
        """(step, evaluator)"""
        key = replace(config, seed=0), arm.alpha, arm.teaching
        if key not in self._steps:
            more: Any = ()
            if arm.alpha and arm.teaching == "online":
                models = [teacher_config().resolved_model()]
                more = (online_objective(distillation(arm), models),)
            elif arm.alpha:
                more = (cached_objective(distillation(arm)),)
            self._steps[key] = jax.jit(make_step(config, *more))
        plain = replace(config.model, dropout=0.0)
        if plain not in self._evaluators:
            evaluator = make_evaluator(config, self.data.validation, lambda b: b)
            self._evaluators[plain] = evaluator
        return self._steps[key], self._evaluators[plain]

    def _start(self, arm: Arm, config: TrainConfig) -> TrainState:
        state = init_state(config)
        if arm.start == "random":
            return state
        teacher, router = self.teacher(config.seed), state.router
        parameters = teacher.parameters
        if arm.start == "upcycled":
            _, parameters, router = upcycle(teacher.model, parameters, arm.upcycle)
        optimizer = make_optimizer(config.optim, config.steps).init(parameters)
        return state._replace(parameters=parameters, router=router, optimizer=optimizer)

    def _batches(self, arm: Arm, config: TrainConfig, seed: int) -> Iterator[Any]:
        batches = train_batches(self.data.train, config.data.length, config.batch, seed)
        if arm.alpha and arm.teaching != "online":
            return traits.with_cache(
                [next(batches) for _ in range(config.steps)],
                self.teacher(seed),
                CACHES[arm.teaching],
                self.folder,
            )
        return iter(batches)

    def _train(self, name: str, seed: int) -> tuple[Curve, TrainState]:
        arm, config = ARMS[name], replace(arm_config(name, self.settings), seed=seed)
        step, evaluate = self._programs(arm, config)
        state, online = self._start(arm, config), arm.alpha > 0 and arm.teaching == "online"
        teachers = [self.teacher(seed)[1:3]] if online else None
        # The teacher reads other text than its students: they learn what it knows, not its order.
        batches = self._batches(arm, config, seed + 1000 if name == "teacher" else seed)
        found = Curve([], [])
        for index, batch in zip(range(1, config.steps + 1), batches, strict=False):
            if teachers:
                batch = self._mixed(arm, config, state, batch, index)
            state, _ = step(state, batch, *([teachers] if teachers else []))
            if index % config.evaluate_every == 0 or index == config.steps:
                found.steps.append(index)
                found.bits.append(evaluate(state))
        require(bool(np.isfinite(found.bits[-1])), f"{name}, seed {seed}: the loss is not finite")
        return found._replace(traits=self._traits(arm, config, state)), state

    def _mixed(
        self, arm: Arm, config: TrainConfig, state: TrainState, batch: Any, index: int
    ) -> Any:
        """The batch, or what the student writes in its place."""
        settings = distillation(arm)
        if not is_on_policy(settings, config.seed, index):
            return text_batch(batch)
        model, vocabulary = config.resolved_model(), self.data.tokenizer.vocabulary
        return own_batch(settings, model, state, batch, vocabulary)

    def _traits(self, arm: Arm, config: TrainConfig, state: TrainState) -> dict[str, Any]:
        if not arm.traits:
            return {}
        model, states = config.resolved_model(), (state.parameters, state.router)
        found = traits.of_experts(model, states)
        if arm.alpha:
            teacher = self.teacher(config.seed)
            found |= traits.of_own_text(model, states, teacher, self.data.validation, config.batch)
        return found
