"""Named settings: two that train on a CPU, and published architectures."""

from moe_jax.config.presets.cpu import SMALL, TINY
from moe_jax.config.presets.published import PUBLISHED, PUBLISHED_PRESETS, Published
from moe_jax.config.train import TrainConfig

PRESETS: dict[str, TrainConfig] = {"tiny": TINY, "small": SMALL} | PUBLISHED_PRESETS
"""By the name that the command line takes, in the order in which --help lists them."""

__all__ = ["PRESETS", "PUBLISHED", "SMALL", "TINY", "Published"]
