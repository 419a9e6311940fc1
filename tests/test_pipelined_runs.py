"""Pipelined runs as a user has them: in one process or two, killed and continued."""

import signal
import time

import pytest

from moe_jax.parallel.processes import LOST_CODE
from tests.several_processes import Started, assert_lost, checkpointed, finish
from tests.small_program import run_settings
from tests.test_survival import kill_when, losses, reached, writing

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

STEPS = 16
PIPE = ["--parallel.pipe", "2", "--parallel.microbatches", "2"]
FAKE = ["--parallel.fake-devices", "2"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of 16 steps and two layers that saves every fourth step."""
    folder = tmp_path_factory.mktemp("pipelined")
    own = run_settings(folder, steps=STEPS, batch=4, save_every=4)
    return [*own, "--model.layers", "2"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Losses of an undisturbed run: one process with two devices."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(settings, out, 1, [*PIPE, *FAKE])
    return losses(out)


def test_two_processes_train_as_one_does(settings, whole, tmp_path):
    """Each device does the same work in the same order, so the losses have the same bits.

    Without a pipeline they are equal up to rounding.
    """
    assert losses(finish(settings, tmp_path / "two", 2, PIPE).out) == whole
    alone = losses(finish(settings, tmp_path / "one", 1).out)
    assert [step for step, _ in alone] == list(range(1, STEPS + 1))
    assert [loss for _, loss in alone] == pytest.approx([loss for _, loss in whole], rel=3e-6)


@pytest.mark.parametrize(("count", "more"), [(2, FAKE), (4, [])])
def test_each_process_reads_the_rows_of_its_devices(settings, whole, tmp_path, count, more):
    """Of two processes, each has a stage and all rows. Of four, each has half of the rows too."""
    run = finish(settings, tmp_path / "run", count, [*PIPE, *more])
    expected = [loss for _, loss in whole]
    assert [loss for _, loss in losses(run.out)] == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_a_stage_ends_the_other_and_the_run_goes_on(settings, whole, tmp_path, victim):
    """With two processes bit for bit. With one, and no pipeline, up to rounding."""
    run = Started(settings, tmp_path / "run", 2, PIPE).until(checkpointed(4))
    other = 1 - victim
    before = run.printed(other)
    run.processes[victim].kill()
    begun = time.monotonic()
    codes = run.codes()
    assert time.monotonic() - begun < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[other] == LOST_CODE, run.all_printed()
    assert_lost(run.printed(other)[len(before) :], other, victim)
    goes_on = finish(settings, run.out, 2, PIPE) if victim else finish(settings, run.out, 1)
    assert "continuing after step" in goes_on.printed()
    if victim:
        assert losses(run.out) == whole
    else:
        expected = [loss for _, loss in whole]
        assert [loss for _, loss in losses(run.out)] == pytest.approx(expected, rel=3e-6)


def test_a_killed_run_of_one_process_continues_bit_for_bit(settings, whole, tmp_path):
    """Before the first checkpoint, while one is being written, and just before the end."""
    own = [*settings, *PIPE, *FAKE]
    out = tmp_path / "run"
    for moment in (reached(1), writing(8), reached(STEPS - 1)):
        kill_when(own, out, moment)
        assert not (out / "result.json").exists()
    finish(own, out, 1)
    assert losses(out) == whole
