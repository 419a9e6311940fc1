"""The search for the fastest layout: it fits, it is the fastest, and it is None where none fits."""

from itertools import product

import pytest

from moe_jax.predict.layouts.block import Recompute
from moe_jax.predict.layouts.block_work import BlockWork
from moe_jax.predict.layouts.fastest import (
    ONCE,
    Job,
    fastest_fsdp,
    fastest_once,
    fastest_pipeline,
    schedule_of,
    work_of,
)
from moe_jax.predict.layouts.pipelined import pipelined, schedule_on
from tests.predict.layouts.toy import BLOCK, cluster

JOB = Job(BLOCK, 8, cluster(4, inside=1e8), rows=2, length=1000)
LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")


@pytest.mark.parametrize("lockstep", [False, True])
def test_it_is_the_fastest(lockstep: bool):
    """Against all layouts, one after the other. 4 experts are not divided by 8 devices."""
    limit = 0.5e9
    updates = []
    for depth, recompute in product((2, 4), LEVELS):
        work = BlockWork(BLOCK, JOB.cluster, 1000, 1, recompute)
        schedule = schedule_on("1f1b", depth, 2 * depth)
        updates.append(pipelined(work, 8, schedule, overhead=1e-3, lockstep=lockstep))
    fitting = [update.seconds for update in updates if update.memory <= limit]
    assert 0 < len(fitting) < len(updates)
    found = fastest_pipeline(JOB, "1f1b", limit, overhead=1e-3, lockstep=lockstep)
    assert found is not None
    assert found.update.seconds == min(fitting)
    assert found.update.memory <= limit


def test_a_layout_gives_its_work_and_schedule_back():
    found = fastest_pipeline(JOB, "interleaved", 1e12)
    assert found is not None
    again = pipelined(work_of(JOB, found), JOB.blocks, schedule_of(JOB, found))
    assert again == found.update


def test_nothing_fits():
    assert fastest_fsdp(JOB, 1.0) is None
    assert fastest_once(JOB, 1.0) is None
    assert fastest_pipeline(JOB, "zb-v", 1.0) is None


def test_more_memory_is_never_slower():
    limits = (0.3e9, 0.6e9, 1.2e9)
    found = [fastest_fsdp(JOB, limit) for limit in limits]
    times = [one.update.seconds for one in found if one is not None]
    assert len(times) > 1
    assert times == sorted(times, reverse=True)


def test_gathering_once_is_a_pipeline_of_one():
    found = fastest_once(JOB, 1e12)
    assert found is not None
    assert (found.name, found.depth) == (ONCE, 1)


def test_too_few_microbatches_for_a_schedule():
    """ZB-H2 needs 2P-1 micro-batches, and two rows give 2P. One row gives P."""
    assert fastest_pipeline(JOB, "zb-h2", 1e12) is not None
    assert fastest_pipeline(Job(BLOCK, 8, JOB.cluster, 1, 1000), "zb-h2", 1e12) is None
