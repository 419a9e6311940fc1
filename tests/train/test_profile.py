from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from moe_jax.runs.run import run_training
from moe_jax.train.profile import StepTrace

STATE = SimpleNamespace(step=0)


@pytest.mark.parametrize(
    ("first", "count", "last", "traced"),
    [(0, 3, 9, [3, 4, 5]), (4, 2, 9, [7, 8]), (0, 9, 5, [3, 4, 5]), (0, 0, 5, []), (0, 2, 2, [])],
)
def test_the_updates_between_start_and_stop(first, count, last, traced, tmp_path, monkeypatch):
    """Updates first+1 … last are made. The first two of a process are not in the trace."""
    running = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    trace = StepTrace(tmp_path, first, count)
    seen = []
    for step in range(first + 1, last + 1):
        trace.before(step, STATE)
        if running:
            seen.append(step)
    trace.close(STATE)
    assert seen == traced
    assert not running


@pytest.mark.slow
def test_a_run_leaves_a_trace(small_run):
    out = run_training(replace(small_run, profile=2))
    assert list((out / "profile").glob("plugins/profile/*/*.xplane.pb"))
