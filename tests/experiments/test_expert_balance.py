"""Device loads of a recorded trace, from the command."""

import json

import pytest

from experiments.expert_balance import Settings, draw, main
from moe_jax.base.errors import UserError
from moe_jax.placement.synthetic import ZipfMarkov, generate_trace
from moe_jax.placement.trace import TraceWriter
from moe_jax.study.expert_balance import Devices, replay_balance, window_loads
from tests.figures import cut_off, overlaps

ZIPF = ZipfMarkov(
    layers=2, experts=16, per_token=2, domains=2, exponent=1.0, repeat=0.2, switch=0.002
)


@pytest.fixture
def trace_file(tmp_path):
    trace = generate_trace(ZIPF, 600, seed=0)
    path = tmp_path / "own.trace"
    with TraceWriter(path, layers=2, experts=16, per_token=2) as writer:
        writer.append(trace.chosen)
    return path


def values(out):
    rows = json.loads((out / "result.json").read_text())["measurements"]
    return {row["name"]: row["value"] for row in rows}


def test_a_recorded_trace(trace_file, tmp_path):
    main(["--trace", str(trace_file), "--out", str(tmp_path / "a"), "--window", "100"])
    found = values(tmp_path / "a")
    assert 1 < found["eplb_load_after"] < found["eplb_load_before"]
    assert found["windows"] == 5
    assert found["eplb_slots"] == 1.5
    assert found["eplb_bounded_copies"] <= 2
    assert (tmp_path / "a" / "plots" / "balance.png").is_file()


def test_two_windows_are_enough(trace_file, tmp_path):
    main(["--trace", str(trace_file), "--out", str(tmp_path / "b"), "--window", "300"])
    assert values(tmp_path / "b")["eplb_copies"] == 0


def test_impossible_settings_are_one_line(trace_file, tmp_path):
    with pytest.raises(UserError, match="devices is 0"):
        Settings(devices=0)
    with pytest.raises(UserError, match="--trace or --run, not both"):
        Settings(trace="a", run="b")
    common = ["--trace", str(trace_file), "--out", str(tmp_path / "c")]
    with pytest.raises(UserError, match="do not divide over 3 devices"):
        main([*common, "--devices", "3", "--window", "100"])
    with pytest.raises(UserError, match="two of one expert"):
        main([*common, "--devices", "2", "--spare", "9", "--window", "100"])


def test_the_plot_is_readable():
    loads = window_loads(generate_trace(ZIPF, 600, seed=0), 100)
    figure = draw(replay_balance(loads, Devices(devices=8), 2), 100)
    assert not overlaps(figure)
    assert not cut_off(figure)


@pytest.mark.slow
def test_quick_trains_and_records(tmp_path):
    main(["--quick", "--out", str(tmp_path)])
    found = values(tmp_path)
    assert 1 <= found["eplb_load_hindsight"] <= found["eplb_load_before"]
