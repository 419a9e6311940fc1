"""Arms with seeds: a run that is finished is read, one that is missing is done."""

import jax
import numpy as np
import pytest

from moe_jax.study.arms import RunStore, run_arms, seed_values


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    done = []
    for _ in range(2):
        store = RunStore(tmp_path / "runs", {"steps": 3})
        run = store.once("thing", lambda: done.append(1) or {"bits": 1.5, "steps": [1]})
        assert run == {"bits": 1.5, "steps": [1]}
    assert done == [1]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "bits 1.500" in printed


def test_other_settings_are_other_runs(tmp_path):
    first = RunStore(tmp_path, {"steps": 3})
    second = RunStore(tmp_path, {"steps": 4})
    first.once("thing", lambda: {"bits": 1.0})
    assert second.once("thing", lambda: {"bits": 2.0}) == {"bits": 2.0}
    assert first.once("thing", dict) == {"bits": 1.0}


def test_a_run_that_fails_leaves_no_file(tmp_path):
    store = RunStore(tmp_path, ())

    def fail():
        raise ArithmeticError("the loss is not finite")

    with pytest.raises(ArithmeticError):
        store.once("thing", fail)
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_the_outer_loop_and_missing_runs_are_done_alone(tmp_path):
    store = RunStore(tmp_path, ())
    done = []

    def run_one(arm, seed):
        done.append((arm, seed))
        return {"bits": 10.0 * seed + len(arm)}

    plan = {"kd": [1, 2], "scratch": [1, 2], "costly": [1]}
    runs = run_arms(store, plan, run_one, prefix="part-")
    assert done == [("kd", 1), ("scratch", 1), ("costly", 1), ("kd", 2), ("scratch", 2)]
    assert seed_values(runs, "kd") == [12.0, 22.0]
    assert seed_values(runs, "costly") == [16.0]
    store.path("part-scratch-2", ".json").unlink()
    done.clear()
    assert run_arms(store, plan, run_one, prefix="part-") == runs
    assert done == [("scratch", 2)]


def test_arrays_are_kept(tmp_path):
    store = RunStore(tmp_path, ())
    tree = {"b": np.arange(3.0, dtype=np.float32), "a": (np.ones((2, 2), np.int32),)}
    again = {"b": 0, "a": (0,)}
    first = store.arrays_once("model", again, lambda: tree)
    second = store.arrays_once("model", again, dict)
    for found in (first, second):
        jax.tree.map(np.testing.assert_array_equal, found, tree)
        assert found["a"][0].dtype == np.int32
