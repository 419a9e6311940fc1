"""kill -9 at the worst moments: the same command continues, every loss the same bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_jax.train.metrics import read_lines
from tests.small_program import run_settings

pytestmark = pytest.mark.usefixtures("compiled_once")

SCRIPT = Path(__file__).parent.parent / "experiments" / "train.py"
STEPS = 30
TIMEOUT = 120


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of 30 steps that saves every third; text and cache shared by all kills."""
    folder = tmp_path_factory.mktemp("survival")
    return run_settings(folder, steps=STEPS, batch=2, save_every=3)


def start(settings: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--out", str(out), *settings],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(settings: list[str], out: Path) -> str:
    process = start(settings, out)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, printed
    return printed


def start_until(
    settings: list[str], out: Path, moment: Callable[[Path], bool]
) -> subprocess.Popen[str]:
    """A run that has just reached the moment."""
    process = start(settings, out)
    deadline = time.monotonic() + TIMEOUT
    while not moment(out):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    return process


def kill_when(settings: list[str], out: Path, moment: Callable[[Path], bool]) -> None:
    process = start_until(settings, out, moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def losses(out: Path) -> list[tuple[int, float]]:
    return [(x["step"], x["loss"]) for x in read_lines(out / "metrics.jsonl")]


def reached(step: int) -> Callable[[Path], bool]:
    def moment(out: Path) -> bool:
        return any(s >= step for s, _ in losses(out))

    return moment


def writing(step: int) -> Callable[[Path], bool]:
    """A checkpoint at or after `step` is half written."""

    def moment(out: Path) -> bool:
        unfinished = (out / "checkpoints" / "unfinished").glob("*")
        return any(f.name.isdigit() and int(f.name) >= step for f in unfinished)

    return moment


def stop(settings: list[str], out: Path, moment: Callable[[Path], bool], number: int) -> str:
    """Sends the signal at the moment. Returns what the run printed until it ended by itself."""
    process = start_until(settings, out, moment)
    os.kill(process.pid, number)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number, printed
    return printed


def test_a_signal_saves_the_step_and_the_next_start_goes_on_from_there(settings, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    own = [*settings, "--checkpoint.every", "1000"]
    printed = stop(own, out, reached(4), signal.SIGTERM)
    kept = re.search(r"stopped by SIGTERM: step (\d+) of 30 is saved: the same command", printed)
    assert kept is not None, printed
    printed = finish(own, out)
    assert f"continuing after step {kept[1]} of {STEPS}" in printed
    finish(own, whole)
    assert losses(out) == losses(whole)


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(settings, out)
    return losses(out)


@pytest.mark.slow
def test_a_run_killed_three_times_continues_bit_for_bit(settings, uninterrupted, tmp_path):
    """Before the first checkpoint, while one is being written, and just before the end."""
    out = tmp_path / "run"
    for moment in (reached(1), writing(12), reached(29)):
        kill_when(settings, out, moment)
        assert not (out / "result.json").exists()
    finish(settings, out)
    assert losses(out) == uninterrupted
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    assert json.loads((out / "result.json").read_text())["experiment"] == "train"


def copying_experts(step: int) -> Callable[[Path], bool]:
    """The experts of a checkpoint at or after `step` are being copied out of their tiers."""

    def moment(out: Path) -> bool:
        return any(
            int(folder.name.removeprefix("experts-")) >= step
            for folder in (out / "checkpoints" / "unfinished").glob("experts-*")
        )

    return moment


@pytest.mark.slow
def test_a_killed_run_in_tiers_continues_bit_for_bit_with_another_budget(settings, tmp_path):
    """Two of eight experts resident, or none; killed at the same moments, and in mid copy."""
    moments = (reached(1), copying_experts(6), writing(12), reached(29))
    budgets = ["350kB", "290kB", "10MB", "350kB"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish([*settings, "--placement.device-budget", "300kB"], whole)
    for moment, budget in zip(moments, budgets, strict=True):
        kill_when([*settings, "--placement.device-budget", budget], out, moment)
    finish([*settings, "--placement.device-budget", "400kB"], out)
    assert losses(out) == losses(whole)
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))


ROUTES = {
    "online": ["--distill.alpha", "0.5"],
    "cache": ["--distill.cache", "samples:4"],
    "own text": ["--distill.on-policy", "0.5", "--distill.prompt", "16"],
    "upcycled": [
        *("--distill.upcycle", "--model.dense-layers", "0", "--model.moe.shared-experts", "0"),
        *("--model.moe.scale", "2.0", "--model.moe.expert-hidden", "16"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_student_killed_three_times_continues_bit_for_bit(settings, tmp_path, route):
    """Its teacher is a dense run of ours; the first kill also meets the cache half made."""
    dense = ["--model.dense-layers", "1", "--model.dense-hidden", "32", "--steps", "6"]
    finish([*settings, *dense], tmp_path / "teacher")
    taught = [*settings, "--distill.teacher", str(tmp_path / "teacher"), *ROUTES[route]]
    whole, out = tmp_path / "whole", tmp_path / "run"
    finish(taught, whole)
    for moment in (reached(1), writing(12), reached(29)):
        kill_when(taught, out, moment)
    finish(taught, out)
    assert losses(out) == losses(whole)
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_said_in_a_line_and_costs_only_time(
    settings, uninterrupted, tmp_path
):
    out = tmp_path / "run"
    kill_when(settings, out, reached(20))
    finished = [p for p in (out / "checkpoints").iterdir() if (p / "MANIFEST.json").exists()]
    newest = max(finished, key=lambda p: int(p.name))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    printed = finish(settings, out)
    assert f"checkpoint {newest.name} is damaged" in printed
    assert losses(out) == uninterrupted


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model.moe.experts-per-token", "99"], "experts_per_token=99 exceeds experts=8"),
        (["--data.source", "files:/nowhere/*.txt"], "/nowhere/*.txt"),
        (["--out", "/proc/run"], "--out '/proc/run' cannot be written"),
        (["--model.vocabulary", "100"], "model.vocabulary=100 is smaller than"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--model.attention.kv-heads", "3"], "heads=4 is not divisible by kv_heads=3"),
                (["--model.moe.groups", "3"], "groups=3 does not divide experts=8"),
                (["--model.moe.expert", "4"], "did you mean --model.moe.experts"),
            )
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, line):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()
    assert len(message) == 1
    assert message[0].startswith("error: ")
    assert line in message[0]
