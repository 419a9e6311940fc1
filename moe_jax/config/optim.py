"""Settings of the optimizer."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import (
    fraction,
    fraction_below_one,
    known_choices,
    not_negative,
    positive,
)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of hidden matrices (arXiv:2502.16982).
    It leaves embedding, head, router and norms to AdamW."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine, or constant with a linear decay at the end.
    wsd stands for warm-up, stable, decay. `constant` never decays.
    Before a decay has begun, wsd and constant go on with more steps in the same folder."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """wsd: fraction of the steps, at the end, over which the learning rate falls."""
    final: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay. It applies to matrices, never to norms or embeddings."""
    beta1: float = 0.9
    """AdamW: decay of the gradient's running mean. Muon has its own."""
    beta2: float = 0.95
    """AdamW: decay of the squared gradient's running mean."""
    epsilon: float = 1e-8
    """Added to the optimizer's denominators, against division by zero."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient. A larger gradient is scaled down. 0 does not clip."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one update."""
    max_skipped: int = 5
    """Stop after this many non-finite updates in a row."""

    def is_at_peak(self, step: int, steps: int) -> bool:
        """Whether the learning rate is at its peak at `step` of `steps` and was never lowered.

        A cosine lowers it from the warm-up on.
        """
        if self.schedule == "cosine":
            return False
        decay = round(self.decay * steps) if self.schedule == "wsd" else 0
        return round(self.warmup * steps) <= step <= steps - decay

    def __post_init__(self) -> None:
        owner = "optim"
        known_choices(owner, self)
        positive(owner, self, "learning_rate", "epsilon", "accumulation", "max_skipped")
        not_negative(owner, self, "weight_decay", "clip_norm")
        fraction(owner, self, "warmup", "decay", "final")
        fraction_below_one(owner, self, "beta1", "beta2")
        require(
            self.schedule != "wsd" or self.warmup + self.decay <= 1,
            f"{owner}.warmup={self.warmup} and decay={self.decay} add up to more than 1",
        )
