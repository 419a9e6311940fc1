"""A case, its fastest layouts, and how they compare."""

import pytest

from moe_jax.predict.layouts.fastest import FSDP, ONCE, Layout
from moe_jax.predict.layouts.fsdp import Update
from moe_jax.study.pipeline_choice.sweep import (
    CASES,
    best_pipeline,
    best_sharded,
    gain,
    layouts_of,
    lockstep_of,
    usable,
)


def layout(name: str, seconds: float) -> Layout:
    return Layout(name, 4, 1, "none", Update(seconds, 1.0))


def test_the_best_of_each_kind():
    found = {
        name: layout(name, seconds)
        for name, seconds in {FSDP: 6.0, ONCE: 4.0, "1f1b": 3.0, "zb-v": 2.0}.items()
    } | {"ours": layout("gpipe", 1.0), "zb-h1": None}
    pipeline = best_pipeline(found)
    sharded = best_sharded(found)
    assert pipeline is not None
    assert sharded is not None
    assert (pipeline.name, sharded.name) == ("zb-v", ONCE)
    assert gain(found) == 2.0
    assert gain({FSDP: layout(FSDP, 1.0), "1f1b": None}) is None


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_a_case_sweeps_its_own_link(case):
    job = case.job(2)
    card = case.at(job, 3e9).cluster.card
    assert (card.link if case.inside else card.network).rate == 3e9
    kept = card.network if case.inside else card.link
    own = job.cluster.card
    assert kept == (own.network if case.inside else own.link)


def test_lockstep_is_not_faster_than_running_free():
    case = CASES[2]
    job = case.job(2)
    ours = lockstep_of(job, usable(job), 0.0, names=("1f1b",))["1f1b"]
    free = layouts_of(job, usable(job), 0.0, names=("1f1b",))["1f1b"]
    assert ours is not None
    assert free is not None
    assert ours.update.seconds > free.update.seconds > job.ideal
