"""A run that is killed again and again, and goes on with other devices and processes each time."""

import re
from typing import NamedTuple

import pytest

from tests.several_processes import Started, checkpointed, finish
from tests.small_program import run_settings
from tests.test_survival import losses

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_once")]

STEPS = 24


class Leg(NamedTuple):
    """A part of a run."""

    processes: int
    layout: list[str]
    until: int
    """It is killed when it has saved this step."""


def fake(devices: int, **axes: int) -> list[str]:
    """A layout of so many devices in a process."""
    sizes = [word for axis, size in axes.items() for word in (f"--parallel.{axis}", f"{size}")]
    return [*sizes, "--parallel.fake-devices", f"{devices}"]


ROUTES = {
    "sharded": [
        Leg(1, fake(8, data=2, fsdp=2, expert=2), 4),
        Leg(1, fake(4, fsdp=2, tensor=2), 10),
        Leg(2, fake(1, expert=2), 16),
    ],
    "pipelined": [
        Leg(1, [*fake(8, pipe=2, fsdp=2, expert=2), "--parallel.microbatches", "1"], 4),
        Leg(1, [*fake(4, pipe=2, data=2), "--parallel.schedule", "zb-h1"], 10),
        Leg(2, [*fake(1, pipe=2), "--parallel.schedule", "gpipe"], 16),
    ],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of 24 steps and two layers that saves every second step."""
    folder = tmp_path_factory.mktemp("layouts")
    own = run_settings(folder, steps=STEPS, batch=8, save_every=2)
    return [*own, "--model.layers", "2"]


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """Losses of a run on one device."""
    return losses(finish(settings, tmp_path_factory.mktemp("whole") / "run", 1).out)


@pytest.mark.parametrize("route", ROUTES)
def test_8_devices_then_4_then_2_processes_then_1_see_the_same_batches(
    settings, uninterrupted, tmp_path, route
):
    """Other rows, or the same in another order of batches, change a loss in its third digit."""
    out = tmp_path / "run"
    done = 0
    for leg in ROUTES[route]:
        run = Started(settings, out, leg.processes, leg.layout).until(checkpointed(leg.until))
        for process in run.processes:
            process.kill()
        run.codes()
        if done:
            assert continued(run.printed()) >= done
        done = leg.until
        assert losses(out)[-1][0] < STEPS, "it was killed too late"
    assert continued(finish(settings, out, 1).printed()) >= done
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    expected = [loss for _, loss in uninterrupted]
    assert [loss for _, loss in losses(out)] == pytest.approx(expected, rel=1e-5)


def continued(printed: str) -> int:
    """The step after which a run has gone on."""
    found = re.search(rf"continuing after step (\d+) of {STEPS}", printed)
    assert found is not None, printed
    return int(found[1])
