"""Settings that are impossible, alone or together, in every config class."""

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    DecodePlacement,
    DistillConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PlacementConfig,
    TrainConfig,
)
from moe_jax.moe.rules import RULES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MoEConfig(experts=4, experts_per_token=5),
            "experts_per_token=5 exceeds experts=4",
        ),
        (lambda: MoEConfig(experts=8, groups=3), "groups=3 does not divide experts=8"),
        (
            lambda: MoEConfig(experts=8, groups=4, groups_per_token=1, experts_per_token=3),
            "experts_per_token=3 exceeds the 2 experts",
        ),
        (lambda: MoEConfig(groups=2, groups_per_token=3), "groups_per_token=3 exceeds groups=2"),
        (lambda: MoEConfig(gate="softmax"), "bias_rate=0.001 needs gate=sigmoid"),
        (lambda: MoEConfig(rule="expert_choice", bias_rate=0), "expert_choice is not causal"),
        (lambda: MoEConfig(rule="hash"), "rule=hash uses no selection bias"),
        (lambda: MoEConfig(rule="balanced"), "rule=balanced uses no selection bias"),
        (
            lambda: MoEConfig(rule="hash", bias_rate=0, groups=2, groups_per_token=1),
            "rule=hash knows no groups",
        ),
        (
            lambda: MoEConfig(rule="token_rouding"),  # type: ignore[arg-type]
            f"model.moe.rule is 'token_rouding': use one of {', '.join(RULES)} (did you mean "
            "token_rounding?)",
        ),
        (lambda: OptimConfig(learning_rate=float("inf")), "learning_rate is inf: it must be below"),
        (lambda: MoEConfig(device_loss=0.1), "device_loss=0.1 needs groups of experts"),
        (lambda: MoEConfig(capacity_factor=-1), "capacity_factor is -1: it must not be negative"),
        (lambda: MoEConfig(rounding_tile=0), "rounding_tile is 0: it must be positive"),
        (lambda: MoEConfig(experts=0), "experts is 0: it must be positive"),
        (lambda: AttentionConfig(heads=4, kv_heads=3), "heads=4 is not divisible by kv_heads=3"),
        (lambda: AttentionConfig(head_dim=7), "head_dim=7 is odd"),
        (lambda: AttentionConfig(kind="mla", rope_dim=5), "rope_dim=5 is odd"),
        (lambda: ModelConfig(layers=2, dense_layers=3), "dense_layers=3 exceeds layers=2"),
        (lambda: DataConfig(source="ftp:x"), "source 'ftp:x' is unknown"),
        (lambda: DataConfig(source="files:"), "source 'files:' is unknown"),
        (lambda: DataConfig(tokenizer="bpe:12"), "bpe:N needs N of at least 258"),
        (lambda: DataConfig(tokenizer="words"), "tokenizer 'words' is unknown"),
        (lambda: DataConfig(validation_fraction=0), "validation_fraction is 0"),
        (lambda: OptimConfig(schedule="wsd", warmup=0.9, decay=0.2), "add up to more than 1"),
        (lambda: OptimConfig(warmup=1.5), "warmup is 1.5: it must lie between 0 and 1"),
        (
            lambda: TrainConfig(batch=6, optim=OptimConfig(accumulation=4)),
            "accumulation=4 does not divide batch=6",
        ),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2 is 1.0: it must lie in [0, 1)"),
        (lambda: CheckpointConfig(keep=1), "checkpoint.keep is 1: it must be at least 2"),
        (lambda: DistillConfig(alpha=2), "distill.alpha is 2: it must lie between 0 and 1"),
        (lambda: DistillConfig(upcycle_noise=-1), "upcycle_noise is -1: it must not be negative"),
        (lambda: DistillConfig(upcycle_noise=0.1), "upcycle_noise=0.1 needs distill.upcycle"),
        (lambda: DistillConfig(cache="top:0"), "distill.cache 'top:0' is unknown"),
        (
            lambda: DistillConfig(cache="top:3", kind="reverse"),
            "distill.cache=top:3 gives the forward divergence only",
        ),
        (lambda: DecodePlacement(low_bit_share=2), "placement.low_bit_share is 2: it must lie"),
        (lambda: TrainConfig(steps=0), "steps is 0"),
        (lambda: TrainConfig(seed=-1), "seed is -1: a seed must lie between 0 and 4294967295"),
        (lambda: TrainConfig(steps=9, continue_to=9), "continue_to=9 is not beyond steps=9"),
        (lambda: TrainConfig(steps=2**31), "steps is 2147483648: it must be below 2147483648"),
        (lambda: TrainConfig(samples=10**9), "samples is 1000000000: it must be below 1025"),
        (lambda: OptimConfig(weight_decay=1e39), "weight_decay is 1e+39: it must be below"),
        (lambda: MoEConfig(capacity_factor=9.0), "capacity_factor=9.0 exceeds experts=8"),
        (lambda: ModelConfig(mtp_depth=17), "model.mtp_depth is 17: it must be at most 16"),
        (lambda: DecodePlacement(look_ahead=-2), "placement.look_ahead is -2: use -1, 0 or"),
        (lambda: TrainConfig(distill=DistillConfig(alpha=0.5)), "need a teacher: set distill."),
        (
            lambda: PlacementConfig(device_budget="2 fish"),
            "placement.device_budget '2 fish' is no size: write it like 2GB",
        ),
        (lambda: PlacementConfig(host_budget="1GB"), "host_budget=1GB needs placement.device_"),
        (
            lambda: TrainConfig(model=ModelConfig(vocabulary=300)),
            "model.vocabulary=300 is smaller than the 4096 tokens",
        ),
    ],
)
def test_impossible_settings_are_one_line_with_the_value(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
