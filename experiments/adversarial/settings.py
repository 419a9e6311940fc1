"""How much work the adversarial experiment does, and the models that it trains.

Everything is bytes: a token is a byte, a window is LENGTH of them, a document is WINDOWS windows.
"""

from dataclasses import dataclass, replace
from typing import Any

from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.model.count import train_flops_per_token

LENGTH = 64
WINDOWS = 8
BATCH = 16
DOCUMENT = LENGTH * WINDOWS + 1
"""Bytes of a document: the last window's last target is one byte after its last input."""
VOCABULARY = 258
"""Bytes and the two specials of the bytes tokenizer."""


@dataclass(frozen=True)
class Scale:
    """How much work a run does: FULL or QUICK."""

    seeds: tuple[int, ...]
    teacher_width: int
    teacher_steps: int
    held_out: int
    """Held-out documents of each domain."""
    pool: int
    """Documents of a pool (data)."""
    data_steps: int
    perturb_steps: int
    teacher_text: int
    """Continuations that the teacher writes (generative)."""
    warm_steps: int
    """Steps of sequence-level distillation that all generative arms share."""
    rounds: int
    """Updates of the generative adversary. The other arms get the same FLOPs."""
    samples: int
    """Continuations sampled to judge a student at a temperature."""
    beyond_documents: int
    beyond_steps: int
    """Updates of one unit of the budget (beyond)."""


FULL = Scale(
    seeds=(0, 1, 2, 3, 4),
    teacher_width=128,
    teacher_steps=1500,
    held_out=20,
    pool=800,
    data_steps=250,
    perturb_steps=200,
    teacher_text=4096,
    warm_steps=400,
    rounds=60,
    samples=128,
    beyond_documents=160,
    beyond_steps=240,
)
QUICK = replace(
    FULL,
    seeds=(0,),
    teacher_width=64,
    teacher_steps=20,
    held_out=2,
    pool=80,
    data_steps=3,
    perturb_steps=3,
    teacher_text=64,
    warm_steps=4,
    rounds=2,
    samples=8,
    beyond_documents=8,
    beyond_steps=6,
)


def student_config(**changes: Any) -> ModelConfig:
    """0.14M parameters: a dense block, then one of 4 experts, 2 of them a token."""
    model = ModelConfig(
        vocabulary=VOCABULARY,
        width=64,
        layers=2,
        dense_layers=1,
        dense_hidden=192,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16),
        moe=MoEConfig(experts=4, experts_per_token=2, expert_hidden=64, bias_rate=0.01),
        init_std=0.06,
        unroll=2,
    )
    return replace(model, **changes)


def teacher_config(width: int) -> ModelConfig:
    """A dense model, 0.43M parameters at width 128: pre-trained and not advanced."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=width // 4)
    return student_config(
        width=width, dense_layers=2, dense_hidden=3 * width, attention=attention, init_std=0.05
    )


def run_config(model: ModelConfig, steps: int, seed: int = 0, **optim: Any) -> TrainConfig:
    """AdamW with warm-up and a cosine over exactly `steps`. `optim` changes its settings."""
    usual = OptimConfig(learning_rate=6e-3, weight_decay=0.1, final=0.05)
    chosen = replace(usual, **optim)
    data = DataConfig(tokenizer="bytes", length=LENGTH)
    return TrainConfig(steps=steps, batch=BATCH, seed=seed, model=model, data=data, optim=chosen)


def window_flops(model: ModelConfig) -> float:
    """FLOPs of the forward and backward pass of one window."""
    return train_flops_per_token(model, LENGTH) * LENGTH
