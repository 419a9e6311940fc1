"""Settings of a whole training run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import tyro

from moe_jax.base.errors import require
from moe_jax.base.seeds import check_seed
from moe_jax.config.checkpoint import CheckpointConfig
from moe_jax.config.checks import known_choices, not_negative, positive
from moe_jax.config.codec import MAY_DIFFER
from moe_jax.config.data import DataConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.config.learning import check_learning
from moe_jax.config.model import ModelConfig
from moe_jax.config.optim import OptimConfig
from moe_jax.config.parallel import ParallelConfig, check_layout
from moe_jax.config.placement import PlacementConfig
from moe_jax.config.processes import ProcessesConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run. `python experiments/train.py PRESET --model.moe.experts 32 …`"""

    preset: tyro.conf.Suppress[str] = "custom"
    """Name of the preset that these settings started from."""
    out: str = field(default="", metadata=MAY_DIFFER)
    """Folder of the run. The same command continues the run that is there.
    Unset, runs/PRESET-HASH: one folder for each set of settings."""
    seed: int = 0
    """Seed of initialisation, data order and sampling, below 2**32."""
    steps: int = 600
    """Optimizer updates."""
    continue_to: int = 0
    """Train on to this step. Unset, the run ends after `steps`.
    After `steps` the learning rate warms up to its peak once more and decays once more.
    It belongs to a run's folder that is there already, whatever its schedule."""
    batch: int = 8
    """Sequences in one update (B), over all micro-batches and devices."""
    evaluate_every: int = field(default=200, metadata=MAY_DIFFER)
    """Steps between evaluations on the validation text. The last step always has one."""
    samples: int = field(default=3, metadata=MAY_DIFFER)
    """Beginnings of held-out documents that the trained model continues, for samples.txt."""
    log: Literal["none", "tensorboard", "wandb"] = field(default="none", metadata=MAY_DIFFER)
    """Copies the metrics to OUT/tensorboard, or to Weights & Biases. metrics.jsonl is there always.
    """
    profile: int = field(default=0, metadata=MAY_DIFFER)
    """Updates to trace with jax.profiler, from the third one on, into OUT/profile."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=MAY_DIFFER)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_DIFFER)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig, metadata=MAY_DIFFER)

    def __post_init__(self) -> None:
        known_choices("", self)
        positive("", self, "steps", "batch", "evaluate_every")
        self._check_length()
        not_negative("", self, "samples", "profile")
        check_seed("seed", self.seed)
        require(
            self.batch % self.optim.accumulation == 0,
            f"optim.accumulation={self.optim.accumulation} does not divide batch={self.batch}",
        )
        self._check_teacher()
        check_learning(self)
        check_layout(self)

    def _check_length(self) -> None:
        require(
            self.continue_to == 0 or self.continue_to > self.steps,
            f"continue_to={self.continue_to} is not beyond steps={self.steps}: unset it, or give "
            "the step at which the longer run ends",
        )
        # The step is a 32-bit integer. Samples are one batch, made when all is trained.
        for name, most in {"steps": 2**31, "continue_to": 2**31, "samples": 1025}.items():
            value = getattr(self, name)
            require(value < most, f"{name} is {value}: it must be below {most}")

    def _check_teacher(self) -> None:
        teacher = self.distill.teacher
        vocabulary = self.model.vocabulary
        require(
            teacher != "" or self.distill == DistillConfig(),
            "the settings of distill need a teacher: set distill.teacher",
        )
        require(
            teacher == "" or not self.placement.tiered,
            f"distill.teacher={teacher} and placement.device_budget="
            f"{self.placement.device_budget}: training with tiers takes no teacher yet, unset one",
        )
        self.distill.check_length(self.data.length)
        # With a teacher, data.tokenizer is not used: the teacher brings its own (train/teacher.py).
        require(
            teacher != "" or vocabulary is None or vocabulary >= self.data.vocabulary,
            f"model.vocabulary={vocabulary} is smaller than the {self.data.vocabulary} tokens of "
            f"data.tokenizer '{self.data.tokenizer}'",
        )

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return self.continue_to or self.steps

    def resolved(self) -> "TrainConfig":
        """The same settings with model.vocabulary filled in from data.tokenizer if it is unset."""
        vocabulary = self.model.vocabulary or self.data.vocabulary
        model = dataclasses.replace(self.model, vocabulary=vocabulary)
        return dataclasses.replace(self, model=model)
