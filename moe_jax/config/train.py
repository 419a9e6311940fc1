"""Settings of a whole training run."""

import dataclasses
from dataclasses import dataclass, field

import tyro

from moe_jax.base.errors import require
from moe_jax.base.seeds import check_seed
from moe_jax.config.checkpoint import CheckpointConfig
from moe_jax.config.checks import not_negative, positive
from moe_jax.config.codec import MAY_DIFFER
from moe_jax.config.data import DataConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.config.learning import check_learning
from moe_jax.config.model import ModelConfig
from moe_jax.config.optim import OptimConfig
from moe_jax.config.placement import PlacementConfig


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
    batch: int = 8
    """Sequences in one update (B), over all micro-batches and devices."""
    evaluate_every: int = field(default=200, metadata=MAY_DIFFER)
    """Steps between evaluations on the validation text. The last step always has one."""
    samples: int = field(default=3, metadata=MAY_DIFFER)
    """Beginnings of held-out documents that the trained model continues, for samples.txt."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=MAY_DIFFER)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        positive("", self, "steps", "batch", "evaluate_every")
        not_negative("", self, "samples")
        check_seed("seed", self.seed)
        require(
            self.batch % self.optim.accumulation == 0,
            f"optim.accumulation={self.optim.accumulation} does not divide batch={self.batch}",
        )
        self._check_teacher()
        check_learning(self)

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

    def resolved(self) -> "TrainConfig":
        """The same settings with model.vocabulary filled in from data.tokenizer if it is unset."""
        vocabulary = self.model.vocabulary or self.data.vocabulary
        model = dataclasses.replace(self.model, vocabulary=vocabulary)
        return dataclasses.replace(self, model=model)
