"""A run's task: the objective and its batches. A teacher wraps both (teacher.py)."""

from dataclasses import dataclass
from typing import Any

from moe_jax.config import TrainConfig
from moe_jax.data.batches import WindowArrays
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokens import TokenData
from moe_jax.model.count import train_flops_per_token
from moe_jax.objectives.base import Batch, Objective
from moe_jax.objectives.next_token import next_token
from moe_jax.train.state import TrainState


@dataclass(frozen=True)
class Task:
    """Next-token prediction on the text. A subclass may learn from more, such as a teacher."""

    config: TrainConfig
    """Resolved: its vocabulary is that of the tokenizer (TrainConfig.resolved)."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that a fresh run must take. None: the one of data.tokenizer."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """A hash of what the run learns from besides the text. It must match to continue a run."""
        return None

    def memory_bytes(self) -> int:
        """Bytes on each device besides the engine's."""
        return 0

    def prepare(self, data: TokenData) -> "Task":
        """The task after its computations on the text, which are done once before the run."""
        return self

    @property
    def objective(self) -> Objective:
        return next_token

    @property
    def operands(self) -> tuple[Any, ...]:
        """Arrays that the objective takes besides the batch."""
        return ()

    @property
    def beside(self) -> WindowArrays | None:
        """Further arrays for each window of the training text."""
        return None

    def abstract_batch(self, batch: Batch) -> Batch:
        """Shapes and dtypes of a batch that the step takes, given those of tokens and segments."""
        return batch

    def batch(self, state: TrainState, step: int, batch: Batch) -> Batch:
        """The batch of update `step` (from 0), given the one that was read, on the devices."""
        return batch

    def first_state(self, state: TrainState) -> TrainState:
        """The state before the first update, given the freshly initialised one."""
        return state

    def flops_per_token(self) -> float:
        """Model FLOPs of one trained token."""
        return train_flops_per_token(self.config.model, self.config.data.length)
