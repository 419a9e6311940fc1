"""Every setting that has a list of values refuses all others, in one line with its name."""

import dataclasses

import pytest

from moe_jax import config
from moe_jax.base.errors import UserError
from moe_jax.config.codec import choices
from moe_jax.distill.teacher_outputs import CacheConfig
from moe_jax.objectives.adversarial import PerturbConfig

CONFIGS = [
    getattr(config, name) for name in config.__all__ if name.endswith(("Config", "Placement"))
]
CHOICES = [
    (kind, name) for kind in (*CONFIGS, CacheConfig, PerturbConfig) for name in choices(kind)
]


def test_there_are_choices_in_most_configs():
    assert len(CHOICES) > 20


@pytest.mark.parametrize(("kind", "name"), CHOICES)
@pytest.mark.parametrize("value", ["typo", None, 3, ["list"], "x" * 5000 + "\n"])
def test_a_value_beside_the_list_is_refused(kind, name, value):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(kind(), **{name: value})
    line = str(caught.value)
    assert name in line
    assert "use one of" in line
    assert line.isprintable()
    assert len(line) < 400
