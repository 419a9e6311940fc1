"""Students of SmolLM2-135M: the teacher, its text and its cache, and the runs on them."""

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from experiments.distillation.arms import Settings
from experiments.distillation.curves import (
    Curves,
    curve_summary,
    curves_of,
    train_curve,
)
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.data.batches import Windows, train_batches
from moe_jax.data.tokens import TokenData, prepare
from moe_jax.distill.cache import CacheConfig, TeacherCache, build_cache, make_outputs
from moe_jax.distill.teacher import Teacher
from moe_jax.interop.gguf import SMOLLM2
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.distillation import cached_objective, online_objective
from moe_jax.study.arms import RunStore, run_arms
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.state import TrainState, init_state
from moe_jax.train.step import make_step

LENGTH = 128
BATCH = 2
ALPHA = 0.9
"""Share of the teacher. The rest is cross-entropy with the text."""
POINTS = 6
"""Evaluations of a run."""
CACHE = CacheConfig("sampled", count=12, batch=4, shard=64)
ARMS = {"ce": 0.0, "kd": ALPHA}
"""The teacher's share in each arm's loss."""


def data_config(quick: bool) -> DataConfig:
    """Python's standard library, or for --quick one package of it, tokenised in no time."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return DataConfig(
        source=f"files:{library}/email/*.py" if quick else "stdlib",
        length=LENGTH,
        validation_fraction=0.2 if quick else 0.02,
        validation_tokens=512 if quick else 12_288,
    )


def student_config(vocabulary: int, quick: bool) -> ModelConfig:
    """3.4M parameters, of which 3.1M are the table of tokens: what two cores train in minutes."""
    width = 16 if quick else 64
    return ModelConfig(
        vocabulary=vocabulary,
        width=width,
        layers=1 if quick else 3,
        dense_layers=0 if quick else 1,
        dense_hidden=3 * width,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=width // 4),
        moe=MoEConfig(experts=4, experts_per_token=2, expert_hidden=3 * width // 2),
        tied_embedding=True,
        init_std=0.05,
        unroll=1 if quick else 2,
    )


@dataclass(frozen=True)
class TeacherCost:
    """The teacher's loss and its price, measured once."""

    bits: float
    """Bits per byte on the held-out text."""
    tokens_per_second: float
    """Of its reading into a cache."""
    bytes_per_token: float
    """Of the cache."""


@dataclass
class SmolLM2Lab:
    """The teacher, its text, and the runs on it. A step is compiled once for all seeds."""

    settings: Settings
    folder: Path
    _steps: dict[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return self.settings.all_seeds()[: self.settings.smollm2_seeds]

    @property
    def tokens(self) -> int:
        """Tokens that the teacher reads."""
        return CACHE.batch * LENGTH if self.settings.quick else self.settings.smollm2_tokens

    @cached_property
    def store(self) -> RunStore:
        # The text and the models follow from these two.
        return RunStore(self.folder, (self.settings.quick, self.tokens))

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher.from_gguf(SMOLLM2)

    @cached_property
    def data(self) -> TokenData:
        return prepare(data_config(self.settings.quick), self.teacher.tokenizer)

    @cached_property
    def cache(self) -> TeacherCache:
        text = self.data.train.first(self.tokens + 1)
        return build_cache(self.folder / "smollm2", self.teacher, text, LENGTH, CACHE)

    def config(self, seed: int = 0) -> TrainConfig:
        """The settings of both arms.

        The learning rate is cross-entropy's best of 3e-3, 6e-3 and 1.2e-2, on a third of the text
        with a seed that is not reported.
        """
        vocabulary = self.teacher.model.vocabulary
        assert vocabulary is not None
        steps = self.tokens // (BATCH * LENGTH)
        return TrainConfig(
            steps=steps,
            batch=BATCH,
            seed=seed,
            evaluate_every=max(2, steps // POINTS),
            model=student_config(vocabulary, self.settings.quick),
            data=data_config(self.settings.quick),
            optim=OptimConfig(learning_rate=3e-3),
        )

    def flops(self) -> tuple[float, float]:
        """(a student's update, the teacher's reading), FLOPs a token."""
        student = train_flops_per_token(self.config().model, LENGTH)
        return student, train_flops_per_token(self.teacher.model, LENGTH) / 3

    def teacher_cost(self) -> TeacherCost:
        """Read from the folder, or measured now."""
        return TeacherCost(**self.store.once("smollm2-teacher", self._measure_teacher))

    def _measure_teacher(self) -> dict[str, float]:
        evaluate = self._evaluator(self.teacher.model)
        rate = self._reading_rate(1 if self.settings.quick else 5)
        return asdict(TeacherCost(evaluate(self.teacher), rate, self.cache.bytes_per_token))

    def _reading_rate(self, repeats: int) -> float:
        """Tokens a second, by the fastest of some calls: other programs slow the rest."""
        windows = Windows(self.data.train, LENGTH, 0, CACHE.batch)
        rows = [windows[index] for index in range(CACHE.batch)]
        tokens, segments = (np.stack([r[k][:LENGTH] for r in rows]) for k in ("tokens", "segments"))
        numbers = np.arange(CACHE.batch)
        read: Callable[..., Any] = make_outputs(
            self.teacher, CACHE, self.teacher.tokenizer.vocabulary
        )
        seconds = []
        for _ in range(repeats + 1):  # the first one compiles
            begin = perf_counter()
            jax.block_until_ready(read(tokens, segments, numbers))
            seconds.append(perf_counter() - begin)
        return CACHE.batch * LENGTH / min(seconds[1:])

    def curves(self) -> Curves:
        """Every arm with every seed, from the folder where they are finished."""
        evaluate = self._evaluator(self.config().model)

        def run_one(arm: str, seed: int) -> dict[str, Any]:
            return self._train(arm, seed, evaluate)

        plan = dict.fromkeys(ARMS, self.seeds)
        runs = run_arms(self.store, plan, run_one, prefix="smollm2-", summary=curve_summary)
        return curves_of(runs)

    def _train(self, arm: str, seed: int, evaluate: Callable[[Any], float]) -> dict[str, Any]:
        config = self.config(seed)
        step = self._step(arm)
        # The plain arm's objective is online_objective without teachers: it takes an empty list.
        operands = [] if ARMS[arm] else [[]]

        def update(state: TrainState, batch: Any, index: int) -> TrainState:
            return step(state, batch, *operands)[0]

        batches = self._batches(arm, seed)
        return train_curve(config, init_state(config), update, batches, evaluate)[0]._asdict()

    def _step(self, arm: str) -> Callable[..., Any]:
        if arm not in self._steps:
            settings = DistillConfig(alpha=ARMS[arm])
            # Without teachers it is plain cross-entropy, but in chunks of the vocabulary: the
            # logits of 49,152 tokens are most of the memory that these students need.
            plain = online_objective(settings, [])
            objective = cached_objective(settings) if ARMS[arm] else plain
            self._steps[arm] = jax.jit(make_step(self.config(), objective))
        return self._steps[arm]

    def _evaluator(self, model: ModelConfig) -> Callable[[Any], float]:
        config = replace(self.config(), model=model)
        return make_evaluator(config, self.data.validation, lambda batch: batch)

    def _batches(self, arm: str, seed: int) -> Iterator[Any]:
        """Every window of the text once."""
        text = self.data.train.first(self.tokens + 1)
        beside = self.cache if ARMS[arm] else None
        return iter(train_batches(text, LENGTH, BATCH, seed, beside=beside))
