import dataclasses

import pytest

from moe_jax.config import TrainConfig, from_dict
from moe_jax.config.presets import PRESETS, PUBLISHED


@pytest.mark.parametrize("name", PRESETS)
def test_presets_carry_their_names_and_survive_a_checkpoint(name):
    config = PRESETS[name]
    assert config.preset == name
    assert from_dict(TrainConfig, dataclasses.asdict(config)) == config
    assert config.resolved().model.vocabulary is not None


def test_every_published_preset_has_figures():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "small"}
