"""Processes with a core each."""

import os

import pytest

from moe_jax.study.on_cores import on_cores, timed, two_cores

pytestmark = pytest.mark.slow


def who(peers, factor):
    assert timed(peers, lambda: None, repeats=2) < 1
    return factor * peers.index, peers.exchange("cores", sorted(os.sched_getaffinity(0)))


def fail(peers):
    raise AssertionError("on purpose")


def test_each_has_its_core_and_they_are_connected():
    cores = two_cores()
    mine = os.sched_getaffinity(0)
    everyone = [[core] for core in cores]
    assert on_cores(who, cores, 10) == [(0, everyone), (10, everyone)]
    assert os.sched_getaffinity(0) == mine


def test_a_process_without_a_result_is_an_error():
    with pytest.raises(RuntimeError, match="process 0 ended with code"):
        on_cores(fail, two_cores())
