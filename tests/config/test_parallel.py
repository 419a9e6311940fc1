from dataclasses import replace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import (
    AttentionConfig,
    ExchangeConfig,
    ParallelConfig,
    settings_that_must_match,
)
from moe_jax.config.presets import PRESETS

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 3}, r"parallel\.expert=3 does not divide model\.moe\.experts=8: .* 9, or"),
        ({"tensor": 3}, r"parallel\.tensor=3 does not divide model\.moe\.expert_hidden=64"),
        ({"tensor": 4}, r"parallel\.tensor=4 does not divide model\.attention\.kv_heads=2"),
        ({"tensor": 8}, r"parallel\.tensor=8 does not divide model\.attention\.heads=4"),
        ({"pipe": 2, "tensor": 2}, r"parallel\.pipe=2 does not go with parallel\.tensor=2"),
        (
            {"pipe": 2, "expert": 2, "exchange": ExchangeConfig("ring")},
            r"exchange\.kind=ring does not go with parallel\.pipe=2",
        ),
        ({"microbatches": 4}, r"parallel\.microbatches=4 needs a pipeline"),
        ({"pipe": 2, "schedule": "zb"}, r"parallel\.schedule is 'zb': use one of gpipe, 1f1b"),
        ({"fsdp": 0}, r"parallel\.fsdp is 0: it must be positive"),
        ({"data": -1}, r"parallel\.data is -1: it must not be negative"),
        ({"fake_devices": 5000}, "at most 1024"),
    ],
)
def test_an_axis_that_does_not_fit_the_model_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, parallel=ParallelConfig(**sizes))


def test_the_vocabulary_and_dense_layers_must_divide_too():
    attention = AttentionConfig(heads=6, kv_heads=3)
    moe = replace(TINY.model.moe, expert_hidden=66)
    model = replace(TINY.model, attention=attention, moe=moe, dense_hidden=384, vocabulary=4097)
    with pytest.raises(UserError, match=r"model\.vocabulary=4097: make model\.vocabulary 4098"):
        replace(TINY, model=model, parallel=ParallelConfig(tensor=3))
    model = replace(model, vocabulary=4098, dense_hidden=385)
    with pytest.raises(UserError, match=r"model\.dense_hidden=385"):
        replace(TINY, model=model, parallel=ParallelConfig(tensor=3))


def test_sizes_must_fill_the_devices():
    assert ParallelConfig(fsdp=2, expert=2).sizes(8)["data"] == 2
    assert ParallelConfig(data=2, fsdp=2, tensor=2).sizes(8)["data"] == 2
    with pytest.raises(UserError, match=r"parallel\.fsdp=3 need a multiple of 3 devices.* are 8"):
        ParallelConfig(fsdp=3).sizes(8)
    with pytest.raises(UserError, match=r"parallel\.data=2, parallel\.fsdp=2 are 4 devices"):
        ParallelConfig(data=2, fsdp=2).sizes(8)


def test_a_layout_may_change_when_a_run_goes_on():
    other = replace(TINY, parallel=ParallelConfig(fsdp=2))
    assert settings_that_must_match(other) == settings_that_must_match(TINY)
