"""The engines: ways to keep and update the state of a run (train/engine.py)."""

from moe_jax.config import TrainConfig
from moe_jax.train.engine import Engine
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.engines.pipelined.engine import PipelinedEngine
from moe_jax.train.engines.rebalanced import RebalancedEngine
from moe_jax.train.engines.tiered.engine import TieredEngine

ENGINES: tuple[type[Engine], ...] = (
    TieredEngine,
    PipelinedEngine,
    RebalancedEngine,
    DenseEngine,
)
"""The first one that applies runs. The last one applies to everything."""


def engine_of(config: TrainConfig) -> Engine:
    """The engine that these settings ask for."""
    return engine_kind(config)(config)


def engine_kind(config: TrainConfig) -> type[Engine]:
    """The class of engine_of, which needs no devices."""
    return next(kind for kind in ENGINES if kind.applies(config))
