"""Experts placed by load while a run trains: the same losses, and a placement that is kept."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import CheckpointConfig, ExchangeConfig, ParallelConfig
from moe_jax.runs.run import run_training
from moe_jax.train import loop
from moe_jax.train.checkpoint import EXPERTS
from moe_jax.train.engines import engine_kind
from moe_jax.train.engines.dense import DenseEngine
from moe_jax.train.engines.rebalanced import RebalancedEngine
from moe_jax.train.metrics import read_lines


def rebalanced(config, every=3, **exchange):
    own = ExchangeConfig(rebalance=every, **{"replicas": 2, **exchange})
    return replace(config, parallel=ParallelConfig(expert=2, exchange=own))


def lines(config):
    return list(read_lines(Path(config.out) / "metrics.jsonl"))


def test_impossible_settings_are_refused(small_run):
    assert engine_kind(rebalanced(small_run)) is RebalancedEngine
    with pytest.raises(UserError, match=r"model\.width=20 does not divide over parallel\.expert=3"):
        replace(
            rebalanced(small_run),
            parallel=ParallelConfig(expert=3, exchange=ExchangeConfig(rebalance=3)),
        )
    dense = replace(small_run.model, dense_layers=1)
    with pytest.raises(UserError, match=r"rebalance=3 needs a model with experts"):
        replace(rebalanced(small_run), model=dense)


def counted(engine, loads, state=None):
    """Steps whose metrics have these loads. The updates themselves are not computed."""
    for load in loads:
        stats = {"sparse": SimpleNamespace(load=np.asarray(load)[None])}
        engine.metrics = SimpleNamespace(stats=stats)
        engine.step(state, {})


def test_loads_between_two_placements_decide_and_are_saved(small_run, monkeypatch, tmp_path):
    """Six experts on two devices with eight slots, by the loads of steps 1 … 3 and 4 … 6."""
    monkeypatch.setattr(DenseEngine, "step", lambda self, state, batch: (state, self.metrics))
    config = rebalanced(small_run)
    hot = [[9, 1, 1, 1, 1, 1], [9, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 60]]
    engine = RebalancedEngine(config)
    first = engine.slots["sparse"]
    counted(engine, hot[:2])
    np.testing.assert_array_equal(engine.slots["sparse"], first)
    assert engine.step_line(2) == {}
    folder = engine.save_beside(tmp_path, 2)
    counted(engine, hot[2:])
    # 60 + 2 of all 90 are expert 5's, and 18 expert 0's: these two are on both devices.
    slots = engine.slots["sparse"]
    assert np.bincount(slots[0]).tolist() == [2, 1, 1, 1, 1, 2]
    assert engine.step_line(3) == {"experts_moved": engine._planner.moved(first, slots)}
    assert engine.step_line(3) == {}

    # From the checkpoint of step 2 on it comes to the same placement.
    folder.rename(tmp_path / EXPERTS)
    again = RebalancedEngine(config)
    again.resume(tmp_path, SimpleNamespace(step=2), tmp_path)
    np.testing.assert_array_equal(again.slots["sparse"], first)
    counted(again, hot[2:])
    np.testing.assert_array_equal(again.slots["sparse"], slots)

    # With other slots a run begins with a placement of its own, and has the same loads.
    other = RebalancedEngine(rebalanced(small_run, replicas=0))
    other.resume(tmp_path, SimpleNamespace(step=2), tmp_path)
    assert other.slots["sparse"].shape == (1, 6)
    assert other._loads["sparse"].tolist() == [[18, 2, 2, 2, 2, 2]]


@pytest.mark.slow
def test_a_run_equals_one_without_and_goes_on_after_a_kill_and_on_other_devices(
    small_run, tmp_path
):
    config = replace(
        small_run,
        steps=8,
        optim=replace(small_run.optim, schedule="constant"),
        checkpoint=CheckpointConfig(every=4),
    )
    run_training(config)
    whole = replace(rebalanced(config), out=str(tmp_path / "whole"))
    run_training(whole)
    for name in ("loss", "gradient_norm", "router_bias_max", "validation_bits_per_byte"):
        one, other = ([x[name] for x in lines(c) if name in x] for c in (config, whole))
        assert one == pytest.approx(other, rel=1e-5)  # float32, other sums
    assert [x["step"] for x in lines(whole) if "experts_moved" in x] == [3, 6]
    assert all(1 <= x["device_imbalance"][0] <= 2 for x in lines(whole))

    # Cut at step 5: the checkpoint of step 4 has one step's loads.
    cut = replace(whole, out=str(tmp_path / "cut"))

    def stop_at_five(_, line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_check_finite", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            run_training(cut)
    run_training(cut)
    for name in ("loss", "experts_moved", "device_imbalance"):
        assert [x.get(name) for x in lines(cut)] == [x.get(name) for x in lines(whole)]

    # On without replicas, and with them again.
    for steps, parallel in ((9, config.parallel), (11, whole.parallel)):
        run_training(replace(cut, steps=steps, parallel=parallel))
    run_training(replace(config, steps=11))
    one, other = ([x["loss"] for x in lines(c)] for c in (config, cut))
    assert len(one) == 11
    assert one == pytest.approx(other, rel=1e-5)
