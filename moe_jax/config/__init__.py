"""Every setting of a training run, as frozen dataclasses that refuse impossible values.

One file holds one subject. `python experiments/train.py --help` prints the fields with their help
texts, which are the strings below them. Each class checks itself when it is made, so a config that
exists can be trained. Named settings are in `moe_jax.config.presets`.
"""

from moe_jax.base.errors import require
from moe_jax.config.attention import AttentionConfig, YarnConfig
from moe_jax.config.checkpoint import CheckpointConfig
from moe_jax.config.codec import fields, from_dict, settings_that_must_match
from moe_jax.config.data import DataConfig
from moe_jax.config.distill import DistillConfig
from moe_jax.config.exchange import ExchangeConfig
from moe_jax.config.model import DType, ModelConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.optim import OptimConfig
from moe_jax.config.parallel import ParallelConfig
from moe_jax.config.placement import DecodePlacement, OnMiss, PlacementConfig
from moe_jax.config.processes import ProcessesConfig
from moe_jax.config.train import TrainConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "DecodePlacement",
    "DistillConfig",
    "ExchangeConfig",
    "MoEConfig",
    "ModelConfig",
    "OnMiss",
    "OptimConfig",
    "ParallelConfig",
    "PlacementConfig",
    "ProcessesConfig",
    "TrainConfig",
    "YarnConfig",
    "fields",
    "from_dict",
    "require",
    "settings_that_must_match",
]
