"""Published architectures, layer for layer, and the parameter counts that their authors state.

A preset describes the architecture (parameters, gate, balance) and a sensible start for the rest.
The training data and the tokenizer are not public, so `data` is only a default. Long-context rope
scaling is left out: it changes no parameter and comes after pre-training.
"""

from dataclasses import dataclass, replace

from moe_jax.config.attention import AttentionConfig
from moe_jax.config.checkpoint import CheckpointConfig
from moe_jax.config.data import DataConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.optim import OptimConfig
from moe_jax.config.train import TrainConfig


def _preset(name: str, model: ModelConfig) -> TrainConfig:
    """A preset around a published architecture, with whole blocks rematerialised.

    Its authors compute in bfloat16 or less. Here the compute dtype is the machine's (`auto`).
    """
    model = replace(model, remat="full", tied_embedding=False)
    assert model.vocabulary is not None
    return TrainConfig(
        preset=name,
        steps=100_000,
        batch=256,
        evaluate_every=1000,
        model=model,
        data=DataConfig(tokenizer=f"bpe:{model.vocabulary}", length=4096),
        optim=OptimConfig(learning_rate=3e-4, schedule="wsd", warmup=0.02),
        checkpoint=CheckpointConfig(every=1000),
    )


_DEEPSEEK_V3 = ModelConfig(  # arXiv:2412.19437 §4.2 and the released config
    vocabulary=129_280,
    width=7168,
    layers=61,
    dense_layers=3,
    dense_hidden=18_432,
    attention=AttentionConfig(
        kind="mla", heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    ),
    moe=MoEConfig(
        experts=256,
        experts_per_token=8,
        expert_hidden=2048,
        shared_experts=1,
        gate="sigmoid",
        normalise=True,
        scale=2.5,
        groups=8,
        groups_per_token=4,
        bias_rate=0.001,
        bias_until=0.966,
        sequence_loss=1e-4,
    ),
    mtp_depth=1,
    init_std=0.006,
)

_DEEPSEEK_V2_LITE = ModelConfig(  # arXiv:2405.04434 appendix B and the released config
    vocabulary=102_400,
    width=2048,
    layers=27,
    dense_layers=1,
    dense_hidden=10_944,
    attention=AttentionConfig(
        kind="mla", heads=16, q_rank=0, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    ),
    moe=MoEConfig(
        experts=64,
        experts_per_token=6,
        expert_hidden=1408,
        shared_experts=2,
        gate="softmax",
        normalise=False,
        bias_rate=0.0,
        sequence_loss=1e-3,
    ),
    init_std=0.006,
)

_DEEPSEEK_MOE_16B = ModelConfig(  # arXiv:2401.06066 §5 and the released config
    vocabulary=102_400,
    width=2048,
    layers=28,
    dense_layers=1,
    dense_hidden=10_944,
    attention=AttentionConfig(kind="gqa", heads=16, kv_heads=16, head_dim=128),
    moe=MoEConfig(
        experts=64,
        experts_per_token=6,
        expert_hidden=1408,
        shared_experts=2,
        gate="softmax",
        normalise=False,
        bias_rate=0.0,
        sequence_loss=1e-3,
    ),
    init_std=0.006,
)

_MIXTRAL_8X7B = ModelConfig(  # arXiv:2401.04088 table 1 and the released config
    vocabulary=32_000,
    width=4096,
    layers=32,
    dense_layers=0,
    attention=AttentionConfig(kind="gqa", heads=32, kv_heads=8, head_dim=128),
    moe=MoEConfig(
        experts=8,
        experts_per_token=2,
        expert_hidden=14_336,
        shared_experts=0,
        gate="softmax",
        normalise=True,
        bias_rate=0.0,
        sequence_loss=0.02,
    ),
    norm_epsilon=1e-5,
    rope_base=1e6,
)

_OLMOE_1B_7B = ModelConfig(  # arXiv:2409.02060 appendix B and the released config
    vocabulary=50_304,
    width=2048,
    layers=16,
    dense_layers=0,
    attention=AttentionConfig(kind="gqa", heads=16, kv_heads=16, head_dim=128, qk_norm="full"),
    moe=MoEConfig(
        experts=64,
        experts_per_token=8,
        expert_hidden=1024,
        shared_experts=0,
        gate="softmax",
        normalise=False,
        bias_rate=0.0,
        sequence_loss=0.01,
        z_loss=0.001,
    ),
    norm_epsilon=1e-5,
)

_QWEN3_30B_A3B = ModelConfig(  # arXiv:2505.09388 table 2 and the released config
    vocabulary=151_936,
    width=2048,
    layers=48,
    dense_layers=0,
    attention=AttentionConfig(kind="gqa", heads=32, kv_heads=4, head_dim=128, qk_norm="head"),
    moe=MoEConfig(
        experts=128,
        experts_per_token=8,
        expert_hidden=768,
        shared_experts=0,
        gate="softmax",
        normalise=True,
        bias_rate=0.0,
        sequence_loss=0.001,
    ),
    rope_base=1e6,
)

PUBLISHED_PRESETS: dict[str, TrainConfig] = {
    name: _preset(name, model)
    for name, model in {
        "deepseek_v3": _DEEPSEEK_V3,
        "deepseek_v2_lite": _DEEPSEEK_V2_LITE,
        "deepseek_moe_16b": _DEEPSEEK_MOE_16B,
        "mixtral_8x7b": _MIXTRAL_8X7B,
        "olmoe_1b_7b": _OLMOE_1B_7B,
        "qwen3_30b_a3b": _QWEN3_30B_A3B,
    }.items()
}


@dataclass(frozen=True)
class Published:
    """Parameter counts as their authors state them, in billions, and how precisely."""

    total: float
    """All parameters."""
    active: float
    """Parameters that compute one token."""
    rounding: float
    """The unit that the figures were rounded to, in billions."""
    source: str
    """Where the authors state them."""
    active_excludes_embedding: bool = False
    """The authors count the head but not the embedding (a look-up) as active."""


PUBLISHED: dict[str, Published] = {
    "deepseek_v3": Published(671.0, 37.0, 1.0, "arXiv:2412.19437, abstract"),
    "deepseek_v2_lite": Published(15.7, 2.4, 0.1, "arXiv:2405.04434, appendix B"),
    "deepseek_moe_16b": Published(16.4, 2.8, 0.1, "arXiv:2401.06066, §5"),
    "mixtral_8x7b": Published(46.7, 12.9, 0.1, "mistral.ai/news/mixtral-of-experts"),
    "olmoe_1b_7b": Published(6.9, 1.3, 0.1, "arXiv:2409.02060, table 10"),
    "qwen3_30b_a3b": Published(30.5, 3.3, 0.1, "huggingface.co/Qwen/Qwen3-30B-A3B"),
}
