"""Runs of experiments/train.py in one or several processes, started, watched and ended by tests."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_jax.parallel.processes.start import free_port
from tests.test_survival import SCRIPT

TIMEOUT = 600


class Started:
    """`count` processes of one run. Each prints into a file of its own."""

    def __init__(self, settings: Sequence[str], out: Path, count: int, more: Sequence[str] = ()):
        self.out = out
        out.parent.mkdir(exist_ok=True, parents=True)
        own = [
            "--processes.count",
            f"{count}",
            "--processes.coordinator",
            f"localhost:{free_port()}",
        ]
        self.files = [out.parent / f"{out.name}-{index}.txt" for index in range(count)]
        self.processes = []
        for index, file in enumerate(self.files):
            words = [*own, "--processes.index", f"{index}"] if count > 1 else []
            command = [sys.executable, str(SCRIPT), "--out", str(out), *settings, *more, *words]
            with file.open("w") as printed:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
                        stdout=printed,
                        stderr=subprocess.STDOUT,
                    )
                )

    def printed(self, index: int = 0) -> str:
        return self.files[index].read_text()

    def until(self, moment: Callable[[Path], bool]) -> "Started":
        deadline = time.monotonic() + TIMEOUT
        while not moment(self.out):
            assert all(p.poll() is None for p in self.processes), self.all_printed()
            assert time.monotonic() < deadline, self.all_printed()
            time.sleep(0.005)
        return self

    def codes(self) -> list[int]:
        """The exit codes, once all have ended. Those that do not end are killed."""
        try:
            return [process.wait(TIMEOUT) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise AssertionError(f"no end in {TIMEOUT} s: {self.all_printed()}") from None

    def all_printed(self) -> str:
        return "\n".join(file.read_text() for file in self.files)


def finish(settings: Sequence[str], out: Path, count: int, more: Sequence[str] = ()) -> Started:
    run = Started(settings, out, count, more)
    assert run.codes() == [0] * count, run.all_printed()
    return run


def checkpointed(step: int) -> Callable[[Path], bool]:
    """The checkpoint of this step, or of a later one, is there."""

    def moment(out: Path) -> bool:
        manifests = (out / "checkpoints").glob("*/MANIFEST.json")
        return any(int(manifest.parent.name) >= step for manifest in manifests)

    return moment


def assert_lost(printed: str, other: int, victim: int) -> None:
    """Process `other` has said in one line that process `victim` is lost, and nothing else."""
    errors = [line for line in printed.splitlines() if "process" in line]
    assert errors == [
        f"process {other}: error: process {victim} is lost (its connection has ended): the run "
        "ends here, the same command continues from the last checkpoint, also with another number "
        "of processes"
    ]
    assert "Traceback" not in printed
