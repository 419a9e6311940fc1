"""Seeds: all that are in range draw differently, and all others are refused in one line."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.initial import root_key
from moe_jax.base.seeds import SEEDS, check_seeds
from moe_jax.cli import parse_settings
from moe_jax.config import DistillConfig, TrainConfig
from moe_jax.data.batches import train_batches
from moe_jax.distill.teacher_outputs import CacheConfig
from moe_jax.distill.upcycle import UpcycleConfig
from moe_jax.objectives.distillation import is_on_policy
from moe_jax.placement.synthetic import generate_trace
from moe_jax.study.sweep.command import SweepConfig

IN_RANGE = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, SEEDS - 2, SEEDS - 1]
REFUSED = [-1, SEEDS, 2**63, 2**64, 10**30, -(2**63) - 1]


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    seeds: int = 5


ENTRANCES = {
    "a key": root_key,
    "a run": lambda seed: TrainConfig(seed=seed),
    "a sweep": lambda seed: SweepConfig(seed=seed),
    "an experiment": lambda seed: parse_settings(Settings(), ["--seed", str(seed)]),
    "a cache": lambda seed: CacheConfig(seed=seed),
    "upcycling": lambda seed: UpcycleConfig(seed=seed),
    "the data": lambda seed: train_batches(None, 1, 1, seed),
    "own text": lambda seed: is_on_policy(DistillConfig(), seed, 0),
    "a trace": lambda seed: generate_trace(None, 1, seed),
}


def test_seeds_in_range_draw_differently():
    draws = {tuple(np.asarray(jax.random.bits(root_key(seed), (2,)))) for seed in IN_RANGE}
    assert len(draws) == len(IN_RANGE)
    for seed in IN_RANGE:
        assert TrainConfig(seed=seed).seed == seed


@pytest.mark.parametrize("seed", REFUSED)
@pytest.mark.parametrize("name", ENTRANCES)
def test_others_are_refused_in_one_line(name, seed):
    with pytest.raises(UserError) as refused:
        ENTRANCES[name](seed)
    line = str(refused.value)
    assert f"seed is {seed}" in line
    assert str(SEEDS - 1) in line
    assert "\n" not in line


def test_the_last_of_several_seeds_is_in_range_as_well():
    check_seeds(Settings(SEEDS - 5))
    with pytest.raises(UserError, match=f"seed is {SEEDS - 4}, and the last of its 5 seeds is"):
        check_seeds(Settings(SEEDS - 4))


def test_a_seed_is_a_whole_number():
    with pytest.raises(UserError, match=r"seed is 1\.5: it must be a whole number"):
        root_key(1.5)
