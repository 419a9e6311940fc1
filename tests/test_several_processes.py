"""Runs of two processes: equal to one, stopped together, and resumed by another number."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from moe_jax.parallel.processes import LOST_CODE
from tests.several_processes import TIMEOUT, Started, assert_lost, checkpointed, finish
from tests.small_program import run_settings
from tests.test_survival import losses, reached

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

STEPS = 16
LONG = ["--steps", "3000", "--evaluate-every", "3000", "--checkpoint.every", "4"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of 16 steps that saves every fourth. Text and cache are shared by all tests."""
    folder = tmp_path_factory.mktemp("several")
    return run_settings(folder, steps=STEPS, batch=4, save_every=4)


def evaluations(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [x["validation_bits_per_byte"] for x in lines if "validation_bits_per_byte" in x]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Undisturbed runs by their number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    return {count: finish(settings, folder / f"{count}", count) for count in (1, 2)}


def test_two_processes_train_as_one_does(whole):
    """The same rows in the same order: other ones change a loss in its third digit."""
    alone, two = (losses(whole[count].out) for count in (1, 2))
    assert [step for step, _ in two] == list(range(1, STEPS + 1))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in alone], rel=3e-6)
    bits = evaluations(whole[1].out)
    assert evaluations(whole[2].out) == pytest.approx(bits, rel=3e-6)


def test_only_the_first_process_prints_and_writes_the_report(whole):
    two = whole[2]
    assert two.printed(1) == ""
    assert "bits per byte on held-out text" in two.printed(0)
    assert "Gloo" not in two.printed(0)
    result = json.loads((two.out / "result.json").read_text())
    assert result["environment"]["devices"] == 2
    assert two.printed(0).count("tokenising") <= 1


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_saves_on_all_and_any_number_of_processes_goes_on(
    settings, whole, tmp_path, told
):
    """With two it goes on bit for bit, with one up to rounding."""
    own = [*settings, "--checkpoint.every", "1000"]
    run = Started(own, tmp_path / "run", 2).until(reached(5))
    run.processes[told].send_signal(signal.SIGTERM)
    assert run.codes() == [143, 143], run.all_printed()
    saved = set()
    for index in (0, 1):
        line = rf"^process {index}: stopped by SIGTERM: step (\d+) of 16 is saved"
        kept = re.findall(line, run.printed(index), re.MULTILINE)
        assert len(kept) == 1, run.printed(index)
        saved |= set(kept)
    (step,) = saved
    count = 2 - told
    goes_on = finish(own, tmp_path / "run", count)
    assert f"continuing after step {step} of {STEPS}" in goes_on.printed(0)
    expected = losses(whole[2].out)
    if count == 2:
        assert losses(run.out) == expected
    else:
        assert [loss for _, loss in losses(run.out)] == pytest.approx(
            [loss for _, loss in expected], rel=3e-6
        )


def test_a_second_sigterm_ends_at_once(settings, tmp_path):
    run = Started([*settings, *LONG], tmp_path / "run", 2).until(reached(3))
    for process in run.processes:  # as a cluster does, to all of them
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    for process in run.processes:
        process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    codes = run.codes()
    assert set(codes) <= {143, LOST_CODE}
    assert 143 in codes
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_ends_the_other_with_one_line_that_says_who(settings, whole, tmp_path, victim):
    """And what is left goes on with one process, or with two bit for bit."""
    run = Started(settings, tmp_path / "run", 2).until(checkpointed(4))
    other = 1 - victim
    before = run.printed(other)
    run.processes[victim].kill()
    begun = time.monotonic()
    codes = run.codes()
    assert time.monotonic() - begun < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[other] == LOST_CODE, run.all_printed()
    assert_lost(run.printed(other)[len(before) :], other, victim)
    finish(settings, run.out, 2 if victim else 1)
    expected = losses(whole[2].out)
    if victim:
        assert losses(run.out) == expected
    else:
        assert [loss for _, loss in losses(run.out)] == pytest.approx(
            [loss for _, loss in expected], rel=3e-6
        )


@pytest.mark.parametrize("axis", ["fsdp", "expert", "tensor"])
def test_an_axis_may_cross_processes_and_another_layout_goes_on(settings, whole, tmp_path, axis):
    """On the axis tensor both processes read the same rows. One process without it goes on."""
    run = Started(settings, tmp_path / "run", 2, [f"--parallel.{axis}", "2"])
    run.until(checkpointed(4))
    run.processes[0].kill()
    run.codes()
    printed = finish(settings, run.out, 1).printed()
    assert re.search(rf"continuing after step (4|8|12) of {STEPS}", printed)
    expected = [loss for _, loss in losses(whole[1].out)]
    assert [loss for _, loss in losses(run.out)] == pytest.approx(expected, rel=1e-5)


def test_a_process_that_hangs_is_lost_too(settings, tmp_path):
    """A machine that is gone, or a process that the system has stopped, closes no connection."""
    more = [*LONG, "--processes.timeout", "10"]
    run = Started([*settings, *more], tmp_path / "run", 2).until(reached(3))
    run.processes[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert run.processes[0].wait(TIMEOUT) == LOST_CODE
    assert 9 < time.monotonic() - begun < 40
    assert "process 0: error: process 1 is lost (it gave no sign of life)" in run.printed(0)
    run.processes[1].kill()
    run.codes()


@pytest.mark.parametrize(
    "route",
    [
        ["--distill.alpha", "0.5"],
        ["--distill.cache", "samples:4"],
        [
            *("--distill.upcycle", "--model.dense-layers", "0", "--model.moe.shared-experts", "0"),
            *("--model.moe.scale", "2.0", "--model.moe.expert-hidden", "16"),
        ],
    ],
    ids=["online", "cache", "upcycled"],
)
def test_a_teacher_of_two_processes_teaches_as_of_one(settings, tmp_path, route):
    dense = ["--model.dense-layers", "1", "--model.dense-hidden", "32", "--steps", "6"]
    finish(settings, tmp_path / "teacher", 1, dense)
    taught = [*settings, "--distill.teacher", str(tmp_path / "teacher"), *route]
    runs = [finish(taught, tmp_path / f"{count}", count).out for count in (1, 2)]
    alone, two = ([loss for _, loss in losses(out)] for out in runs)
    if "--distill.upcycle" in route:
        # The student begins as its teacher, so the gradient is rounding that Adam makes large.
        assert two[0] == pytest.approx(alone[0], abs=1e-6)
    else:
        assert two == pytest.approx(alone, rel=3e-6)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["--placement.device-budget", "300kB"],
            "placement.device_budget=300kB and 2 devices: training with tiers uses one device",
        ),
        (
            ["--distill.teacher", "x", "--distill.on-policy", "0.5", "--distill.prompt", "16"],
            "distill.on_policy=0.5 and 2 processes: the student writes its own text in one process",
        ),
        (["--batch", "3"], "batch=3 in optim.accumulation=1 parts does not divide over 2 devices"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line_in_each(settings, tmp_path, more, line):
    run = Started([*settings, *more], tmp_path / "run", 2)
    assert run.codes() == [2, 2], run.all_printed()
    for index in (0, 1):
        (error,) = [x for x in run.printed(index).splitlines() if "error: " in x]
        assert error.startswith(f"process {index}: error: ")
        assert line in error
