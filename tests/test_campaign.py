"""The campaign of faults: its parts, a kill of each kind of run, and a short campaign."""

import errno
import random
from pathlib import Path

import pytest

from tests.campaign import shim
from tests.campaign.bench import LIMIT, STEPS, Bench, bench, choice, losses, relative_calls
from tests.campaign.checks import kept, same, set_aside, snapshot
from tests.campaign.kinds import KINDS
from tests.campaign.run import campaign, usable
from tests.campaign.shim import Call, Faults
from tests.interop import conftest

MINUTES = 6


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One process that forks, one cache of compiled programs, and each undisturbed run once."""
    with bench(tmp_path_factory.mktemp("campaign")) as shared:
        yield shared


@pytest.mark.slow  # a stage of its own in .ci/run
@pytest.mark.parametrize("kind", ["tiered", "student"])
def test_a_killed_run_continues_bit_for_bit(shared: Bench, kind: str):
    """Killed after step 7, it goes on after a checkpoint and does the steps since then again.

    The save of step 6 has waited for that of step 3, so there is a checkpoint.
    """
    with shared.trial_folder(kind) as place:
        options = options_of(shared, kind, place)
        run = place / "run"
        program = shared.start(place, options)
        assert program.wait_until(lambda: len(losses(run)) >= 7, LIMIT), program.error_output()
        program.kill()
        before = losses(run)
        assert 7 <= len(before) < STEPS
        said = shared.finish(place, options).output()
        assert "continuing after step" in said
        after = losses(run)
        assert list(after) == list(range(1, STEPS + 1))
        assert {step: after[step] for step in before} == before


def options_of(shared: Bench, kind: str, place: Path) -> list[str]:
    """Of a run in tiers, or of a student whose teacher needs no training."""
    if kind == "tiered":
        return shared.options("tiered", place)
    teacher = conftest.write(place / "teacher.gguf")
    taught = ["--distill.teacher", str(teacher), "--distill.alpha", "0.5"]
    return [*shared.options("plain", place), *taught]


def test_errors_of_the_disk_reach_the_checkpoint_library(shared: Bench):
    """A full disk at the first checkpoint: tensorstore gets the error, the run ends with a line."""
    if shared.library is None:
        pytest.skip("there is no C compiler")
    with shared.trial_folder("full") as place:
        log = place / "calls"
        faults = Faults(
            f"{place}/run/checkpoints/*value/*", "write", errno=errno.ENOSPC, log=str(log)
        )
        options = shared.options("tiered", place)
        program = shared.start(place, options, faults).wait(LIMIT)
        assert program.code != 0
        hit = [call for call in relative_calls(log, place) if call.fault]
        assert any("tensorstore" in call.library for call in hit)
        assert "No space left on device" in program.error_output()


@pytest.mark.slow
def test_a_short_campaign(shared: Bench):
    """Every kind takes its turns for a few minutes."""
    tallies = campaign(shared, usable(list(KINDS), shared), MINUTES * 60, seed=0)
    assert {name: tally.failures for name, tally in tallies.items() if tally.failures} == {}


def test_snapshots_see_every_change(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("one")
    before = snapshot(tmp_path)
    same(before, snapshot(tmp_path))
    (tmp_path / "folder" / "file").write_text("two")
    with pytest.raises(AssertionError, match="changed"):
        same(before, snapshot(tmp_path))
    (tmp_path / "folder" / "file").unlink()
    with pytest.raises(AssertionError, match="gone"):
        same(before, snapshot(tmp_path))


def test_a_checkpoint_that_is_removed_is_noticed(tmp_path):
    good = tmp_path / "checkpoints" / "3"
    good.mkdir(parents=True)
    (good / "state").write_text("bits")
    before = {"3": snapshot(good)}
    kept(before, tmp_path, ["3"])
    good.rename(tmp_path / "damaged-3")
    set_aside(before["3"], tmp_path, "3")
    with pytest.raises(AssertionError, match="good and are gone"):
        kept(before, tmp_path, ["3"])
    (tmp_path / "damaged-3" / "state").unlink()
    with pytest.raises(AssertionError, match="not set aside"):
        set_aside(before["3"], tmp_path, "3")


def test_settings_of_the_faults_library():
    faults = Faults("/x/*", "read", after=3, errno=errno.EIO)
    given = {"FAULT_PATH": "/x/*", "FAULT_CALLS": "read", "FAULT_AFTER": "3", "FAULT_ERRNO": "5"}
    assert faults.environment() == given
    assert "EIO" in str(faults)
    for name in ("FAULT_PATH", "FAULT_SECONDS", "FAULT_TIMES", "FAULT_TORN", "FAULT_LOG"):
        assert f'"{name}"' in shim.SOURCE.read_text()


def test_calls_are_chosen_by_group():
    calls = [Call("read", "a", "", False)] * 99 + [Call("rename", "b", "", False)]
    chosen = {choice(random.Random(seed), calls)[0] for seed in range(20)}
    assert chosen == {"read", "rename"}
