"""The byte-level arms of the distillation experiment: settings, models, and what they cost."""

from dataclasses import dataclass, replace
from typing import Literal

from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from moe_jax.distill.cache import CacheConfig
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config
from moe_jax.model.count import train_flops_per_token

UPCYCLE = UpcycleConfig(experts=4, experts_per_token=2, noise=0.01)
POINTS = 10
"""Evaluations of a run."""
PROMPT = 32
"""Bytes of text that a student continues when it writes its own batches."""
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
    """Number of seeds, one after the other from `seed`."""
    costly_seeds: int = 5
    """At most this many of them for the arms that write their own text."""
    steps: int = 300
    """Updates of a student."""
    teacher_steps: int = 600
    """Updates of a teacher, and of the dense student of its size."""
    smollm2_seeds: int = 5
    """At most this many seeds for the comparison with SmolLM2. 0 leaves it out."""
    smollm2_tokens: int = 98_304
    """Tokens that SmolLM2 reads. Its students are trained on each of them once."""
    quick: bool = False
    """One seed, a few updates, one arm of a kind, without SmolLM2 (smollm2.py has a --quick)."""

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
    """Updates of a student, of a teacher, or those that cost the FLOPs of both together."""
    dropout: float = 0.0
    teaching: Literal["online", "sampled", "top_k"] = "online"
    """Whole distributions, or a cache of them (CACHES)."""
    on_policy: float = 0.0
    """Fraction of the batches that the student writes itself."""
    upcycle: UpcycleConfig = UPCYCLE

    @property
    def examined(self) -> bool:
        """Whether its experts are examined, and its own text if it is taught."""
        return self.sparse and self.length == "student" and not self.dropout

    @property
    def online(self) -> bool:
        """Whether the teacher reads every batch during training."""
        return self.alpha > 0 and self.teaching == "online"


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
TAUGHT = tuple(name for name, arm in ARMS.items() if arm.alpha > 0)
PLAIN = tuple(name for name, arm in ARMS.items() if arm.alpha == 0 and name != "teacher")


def plan(settings: Settings) -> dict[str, list[int]]:
    """The seeds of each arm."""
    return {name: seeds_of(name, settings) for name in (QUICK if settings.quick else ARMS)}


def seeds_of(name: str, settings: Settings) -> list[int]:
    """The seeds of an arm: those that write their own text are costly and may have fewer."""
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
    return TrainConfig(
        batch=16, model=model, data=data, optim=OptimConfig(learning_rate=3e-3)
    ).resolved()


def flops_per_token(arm: Arm, config: TrainConfig) -> float:
    """FLOPs of an update of the arm, a token.

    A forward pass is a third of an update. A taught arm adds one of its teacher's. An arm that
    writes adds one of its own for the fraction that it writes.
    """
    length = config.data.length
    reading = train_flops_per_token(teacher_config().model, length) / 3
    own = train_flops_per_token(config.model, length)
    return own * (1 + arm.on_policy / 3) + (reading if arm.alpha else 0.0)


def teacher_training(settings: Settings) -> float:
    """FLOPs of the teacher's training, divided by the tokens of one update."""
    return settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher_config())


def updates(arm: Arm, settings: Settings, config: TrainConfig) -> int:
    """How many updates an arm gets."""
    if arm.length != "equal FLOPs":
        return settings.steps if arm.length == "student" else settings.teacher_steps
    taught = settings.steps * flops_per_token(Arm(alpha=1), config)
    return round((teacher_training(settings) + taught) / flops_per_token(arm, config))


def arm_config(name: str, settings: Settings) -> TrainConfig:
    """The model and schedule of an arm."""
    arm = ARMS[name]
    config = teacher_config()
    model = sparse_config(config.model, UPCYCLE) if arm.sparse else config.model
    config = replace(config, model=replace(model, dropout=arm.dropout))
    steps = updates(arm, settings, config)
    return replace(config, steps=steps, evaluate_every=max(5, steps // POINTS))
