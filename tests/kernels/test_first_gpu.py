"""The first minutes on a GPU: every step ends, whatever it does, and what it found is on disk."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from moe_kernels.bench.launches import LAUNCHES
from moe_kernels.first_gpu import command, programs, speed
from moe_kernels.first_gpu.context import Context, Outcome, Settings
from moe_kernels.first_gpu.record import Predictions, Record
from moe_kernels.first_gpu.runner import Runner

from tests.kernels import fake_steps

ROOT = Path(__file__).parents[2]
PEERS = {"layers": ("xla=moe_jax.moe.xla:mixture",), "plan": "moe_jax.moe.plan:plan_by_kernels"}


@pytest.fixture
def runner(tmp_path):
    runner = Runner(Settings(tmp_path), fake_steps.serve)
    yield runner
    runner.close()


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "first_gpu.json", {}, Predictions(tmp_path / "none"))


def written(record):
    return json.loads(record.path.read_text())


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(runner):
    found = []
    start = time.monotonic()
    outcome = runner.perform("hang", 3.0, found.append)
    assert time.monotonic() - start < 8
    assert (outcome.ok, outcome.reason) == (False, "ended at its deadline of 3 s")
    assert found == [fake_steps.MEASUREMENT]  # what it measured before is kept
    assert runner.perform("right", 20.0, found.append).ok


def test_a_step_is_ended_with_the_programs_that_it_started(runner):
    found = []
    runner.perform("leave_a_child", 3.0, found.append)
    child = Path(f"/proc/{found[0]['value']}/stat")
    # A zombie has ended: nobody has asked for its exit code yet.
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the program still runs")


def test_a_crash_and_an_exception_are_a_reason_and_a_new_process(runner):
    first = runner.perform("right", 20.0, lambda _: None)
    second = runner.perform("right", 20.0, lambda _: None)
    assert first.details == second.details  # one process for all, while nothing happens
    assert runner.perform("crash", 20.0, print).reason == "its process ended with signal 11"
    raised = runner.perform("error", 20.0, print)
    assert raised.reason == "RuntimeError: illegal address"
    third = runner.perform("right", 20.0, lambda _: None)
    assert third.ok
    assert third.details != first.details


class InProcess:
    """A runner whose steps only take time, on a clock of its own."""

    def __init__(self, monkeypatch, outcomes, seconds):
        self.outcomes = outcomes
        self.seconds = seconds
        self.now = 1000.0
        self.allowed = {}
        monkeypatch.setattr(command.time, "monotonic", lambda: self.now)

    def perform(self, name, seconds, report):
        self.allowed[name] = seconds
        self.now += min(self.seconds, seconds)
        report({"name": name, "value": 1.0, "unit": "x"})
        return self.outcomes.get(name, Outcome(True))

    def close(self):
        self.closed = True


def test_a_failed_step_does_not_end_the_run(monkeypatch, record):
    runner = InProcess(monkeypatch, {"layers": Outcome(False, "why")}, seconds=5)
    command.run(command.PARTS["measure"], 4.5, runner, record)
    content = written(record)
    assert [step["name"] for step in content["steps"]] == list(command.PARTS["measure"])
    failed = [step for step in content["steps"] if not step["ok"]]
    assert [(step["name"], step["reason"]) for step in failed] == [("layers", "why")]
    assert len(content["measurements"]) == len(command.PARTS["measure"])
    # Half the time is half the seconds of each step, and the last one has all that is left.
    assert runner.allowed["correctness"] == command.PARTS["measure"]["correctness"] / 2
    assert runner.allowed["soak"] == 60 * 4.5 - 7 * 5
    assert runner.closed
    table = record.table()
    assert "layers               FAILED       5.0  why" in table


def test_steps_for_which_no_time_is_left_say_so(monkeypatch, record):
    runner = InProcess(monkeypatch, {}, seconds=1000)
    command.run({"environment": 60.0, "layers": 600.0, "soak": 100.0}, 1.5, runner, record)
    assert [step["reason"] for step in written(record)["steps"]] == ["", "", "no time was left"]
    assert runner.allowed == {"environment": 60.0, "layers": 30.0}


def test_without_an_environment_nothing_else_runs(monkeypatch, record):
    fault = {"environment": {"device": "cpu"}}
    outcome = Outcome(False, "ptxas 12.0 is too old", fault)
    runner = InProcess(monkeypatch, {"environment": outcome}, seconds=1)
    command.run(command.PARTS["measure"], 9, runner, record)
    content = written(record)
    assert [step["reason"] for step in content["steps"]] == ["ptxas 12.0 is too old"]
    assert content["environment"] == {"device": "cpu"}


def test_times_are_compared_with_what_was_predicted(tmp_path):
    file = tmp_path / "predicted.json"
    interval = {"seconds_low": 1.0, "seconds_high": 2.0}
    layer = {"shape": "M", "kind": "forward", "implementation": "xla", **interval}
    launches = [{"shape": "M", "launch": "up", **interval, "flops": 1.0}]
    file.write_text(json.dumps({"device": "H100", "launches": launches, "layers": [layer]}))
    record = Record(tmp_path / "first_gpu.json", {}, Predictions(file))
    record.environment = {"device": "NVIDIA H100 80GB HBM3"}
    named = {"name": "n", "unit": "s", "shape": "M"}
    record.add_measurement({**named, "value": 1.5, "launch": "up"})
    where = {"kind": "forward", "implementation": "xla"}
    record.add_measurement({**named, "value": 2.5, **where})
    record.add_measurement({**named, "value": 2.5, "launch": "down"})
    record.environment = {"device": "NVIDIA A100"}
    record.add_measurement({**named, "value": 1.5, "launch": "up"})
    judged = [m.get("inside") for m in written(record)["measurements"]]
    assert judged == [True, False, None, None]
    table = record.table()
    assert "OUTSIDE 1 to 2" in table
    assert "predictions: 1 of 2 measurements inside" in table


def test_everything_of_our_own_that_is_measured_was_predicted():
    """The names of the recorded prediction are those of the measurements."""
    predicted = Predictions(ROOT / "kernels/results/predicted.json")
    for shape in (*speed.THREE, speed.LARGE):
        expected = {(shape, launch) for launch in LAUNCHES}
        expected |= {(shape, kind, "triton") for kind in ("forward", "train")}
        assert expected <= predicted.intervals.keys()
    where = {"shape": speed.MODEL, "launch": "up", "value": 1.0}
    assert predicted.judged(where, predicted.device)["inside"] is False  # a whole second
    assert predicted.judged(where, "NVIDIA A10") == where


def test_a_tool_is_run_and_its_errors_are_counted(monkeypatch, tmp_path):
    def context(seconds=60.0):
        settings = Settings(tmp_path)
        return Context(settings, time.monotonic() + seconds, reported.append)

    reported = []
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs.memcheck(context()).reason == "compute-sanitizer is not installed"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'\nexit 1\n")
    tool.chmod(0o755)
    outcome = programs.memcheck(context())
    assert outcome.reason == "2 errors; ========= ERROR SUMMARY: 2 errors"
    assert reported == [{"name": "memcheck_errors", "value": 2, "unit": "errors"}]
    assert "SUMMARY" in (tmp_path / "memcheck.txt").read_text()
    # With a program of its own, which outlives it and would keep its output open.
    tool.write_text("#!/bin/sh\necho begun\n/bin/sleep 1000 &\nwait\n")
    assert programs.racecheck(context(1.0)).reason == "0 errors; ended when its time was up"


def test_figures_of_a_profile_are_read():
    report = """
    ----------------------- ------------- ------------
    Metric Name               Metric Unit Metric Value
    DRAM Throughput                     %        21.50
    Duration                           us     1,234.56
    Registers Per Thread     register/thread       168
    """
    found = programs.profiled_metrics(report)
    assert ("Duration", "us", 1234.56) in found
    assert ("Registers Per Thread", "register/thread", 168.0) in found
    assert len(found) == 3


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_that_cannot_be_are_refused(tmp_path, capsys, minutes):
    arguments = ["--out", str(tmp_path), "--minutes", minutes]
    assert command.main(arguments, Settings(tmp_path), tmp_path / "none") == 2
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    arguments = ["--out", str(tmp_path), "--minutes", "9", "--dry-run"]
    assert command.main(arguments, Settings(tmp_path, **PEERS), tmp_path / "none") == 1
    content = json.loads((tmp_path / "first_gpu.json").read_text())
    steps = {step["name"]: step for step in content["steps"]}
    assert steps.keys() == command.PARTS["measure"].keys()
    # The ladder is the one script that has to be given; the slow test below has it.
    assert steps.pop("ladder")["reason"] == "no script was given"
    assert all(step["ok"] for step in steps.values()), steps
    names = {m["name"] for m in content["measurements"]}
    assert {"OLMoE-1B-7B up", "OLMoE-1B-7B xla train", "OLMoE-1B-7B triton kept"} <= names
    assert {"fixed_cases", "random_cases", "OLMoE-1B-7B rows table over fastest"} <= names
    assert os.listdir(tmp_path) == ["first_gpu.json"]


@pytest.mark.slow
@pytest.mark.parametrize("part", command.PARTS)
def test_the_command_runs_whole_without_a_gpu(tmp_path, part):
    script = str(ROOT / "kernels/first_gpu.py")
    arguments = ["--out", str(tmp_path), "--part", part, "--dry-run"]
    # From another folder and without an installation: the script finds its packages.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) <= 4
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1 << 20
