"""Settings of checkpoints."""

from dataclasses import dataclass

from moe_jax.base.errors import require
from moe_jax.config.checks import positive


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run is saved, and how many checkpoints stay on disk."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Latest checkpoints that stay. The one with the best validation loss stays as well."""

    def __post_init__(self) -> None:
        positive("checkpoint", self, "every")
        require(
            self.keep >= 2,
            f"checkpoint.keep is {self.keep}: it must be at least 2, so that a kill during one "
            "save leaves another",
        )
