import dataclasses

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PlacementConfig,
    TrainConfig,
    fields,
    from_dict,
    parse_bytes,
)
from moe_jax.config.presets import PRESETS, PUBLISHED


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
        (
            lambda: MoEConfig(rule="hash", bias_rate=0, groups=2, groups_per_token=1),
            "rule=hash knows no groups",
        ),
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
        (lambda: TrainConfig(steps=0), "steps is 0"),
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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_carry_their_names_and_survive_a_checkpoint(name):
    config = PRESETS[name]
    assert config.preset == name
    assert from_dict(dataclasses.asdict(config)) == config
    assert config.model.vocabulary is not None


def test_every_published_preset_has_figures():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "small"}


def test_the_vocabulary_comes_from_the_tokenizer_unless_set():
    assert TrainConfig(data=DataConfig(tokenizer="bytes")).model.vocabulary == 258
    config = TrainConfig(data=DataConfig(tokenizer="bpe:512"), model=ModelConfig(vocabulary=1024))
    assert config.model.vocabulary == 1024


def test_fields_are_flat_and_dotted():
    assert fields(TrainConfig())["model.moe.experts"] == TrainConfig().model.moe.experts


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        ("512 mb", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("64k", 64_000),
        ("8Ki", 8192),
        (".5kB", 500),
        ("0", 0),
    ],
)
def test_sizes_in_bytes(text, size):
    assert parse_bytes("x", text) == size


@pytest.mark.parametrize("text", ["", "GB", "2i", "-1GB", "1e9", "2 G B", "1,5GB", "3PB", "nan"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(UserError, match=r"^--x '.*' is no size: write it like 2GB"):
        parse_bytes("--x", text)


def test_a_config_saved_before_there_were_tiers_can_be_read():
    saved = dataclasses.asdict(TrainConfig())
    del saved["placement"]
    assert from_dict(saved) == TrainConfig()
