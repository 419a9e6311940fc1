"""What does a second process give a training run?

    python experiments/process_scaling.py [--preset tiny] [--out DIR] [--quick]

Every process of `train.py` is bound to one core, so that a second process is a second core. Strong
scaling keeps the batch, and weak scaling doubles it with the processes. One process on both cores
is the control: it shares the work between threads. All are run in every round, and ratios are taken
within a round. Linux only, because the cores are.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.base.console import track
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, preset, program
from moe_jax.config import TrainConfig
from moe_jax.config.presets import PRESETS
from moe_jax.parallel.processes.start import free_port
from moe_jax.study.on_cores import two_cores
from moe_jax.study.results import table
from moe_jax.study.rounds import speedup
from moe_jax.train.metrics import read_lines

QUESTION = "What does a second process give a training run?"
TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Settings:
    """Times updates of train.py in one and in two processes."""

    preset: str = "tiny"
    """Preset that is trained."""
    out: str = "runs/process-scaling"
    """Folder for result.json."""
    seed: int = 0
    """Seed of the runs."""
    steps: int = 30
    """Updates of each run. The first one is not timed."""
    rounds: int = 3
    """Times that each run is made."""
    quick: bool = False
    """One round of five updates."""


class Arm(NamedTuple):
    """A way to run: the cores of each process, and the batch as a multiple of the preset's."""

    cores: tuple[tuple[int, ...], ...]
    batches: int


def arms(first: int, second: int) -> dict[str, Arm]:
    """The arms on these two cores."""
    return {
        "one_process": Arm(((first,),), 1),
        "one_process_two_cores": Arm(((first, second),), 1),
        "strong": Arm(((first,), (second,)), 1),
        "weak": Arm(((first,), (second,)), 2),
    }


def token_seconds(arm: Arm, config: TrainConfig, steps: int, compiled: str) -> float:
    """Median seconds of an update over its tokens.

    `compiled` is a folder of compiled programs: each round would compile the same ones anew.
    """
    batch = config.batch * arm.batches
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), config.preset, "--out", folder]
        command += ["--seed", str(config.seed), "--batch", str(batch), "--steps", str(steps)]
        command += ["--evaluate-every", "100000", "--samples", "0"]
        if len(arm.cores) > 1:
            command += ["--processes.count", str(len(arm.cores))]
            command += ["--processes.coordinator", f"localhost:{free_port()}"]
        run_together(command, arm, compiled)
        lines = list(read_lines(Path(folder) / "metrics.jsonl"))
        seconds = [line["seconds"] for line in lines if "seconds" in line]
    return float(np.median(seconds)) / (batch * config.data.length)


def run_together(command: list[str], arm: Arm, compiled: str) -> None:
    """Starts one process for each set of cores, and waits for all."""
    processes = []
    for index, cores in enumerate(arm.cores):
        own = ["--processes.index", str(index)] if len(arm.cores) > 1 else []
        bound = ["taskset", "--cpu-list", ",".join(map(str, cores))]
        # One device each, however many this program simulates.
        own_settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        environment = {**os.environ, **own_settings, "JAX_COMPILATION_CACHE_DIR": compiled}
        processes.append(
            subprocess.Popen([*bound, *command, *own], env=environment, stdout=subprocess.DEVNULL)
        )
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the folder is removed, so the runs must not go on in it
        for process in processes:
            process.kill()
        raise
    if any(codes):
        raise RuntimeError(f"{' '.join(command)} ended with {codes}")


def measure(seconds: dict[str, list[float]]) -> list[Measurement]:
    """Speeds of the arms, each as a ratio to one process on one core."""
    rows = []
    for name, values in seconds.items():
        ratio = speedup(values, seconds["one_process"])
        speed = 1 / float(np.median(values))
        rows.append(Measurement(f"{name}.tokens_per_second", speed, "tokens/s"))
        rows.append(Measurement(f"{name}.speedup", ratio, "ratio", "one process, one core", ratio))
    return rows


def verdict(measurements: list[Measurement]) -> str:
    """One sentence."""
    found = {m.name: m.value for m in measurements}
    return (
        f"with a core each, two processes are {found['strong.speedup']:.2f}x as fast as one at the "
        f"same batch and {found['weak.speedup']:.2f}x at twice the batch; one process with both "
        f"cores is {found['one_process_two_cores.speedup']:.2f}x as fast"
    )


def main(argv: list[str]) -> None:
    """Measures and writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    cores = two_cores()
    out = output_folder(settings.out)
    config = replace(preset(PRESETS, settings.preset), seed=settings.seed)
    rounds = 1 if settings.quick else settings.rounds
    steps = 5 if settings.quick else settings.steps
    chosen = arms(*cores)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as compiled:
        for _ in track(range(rounds), "rounds"):
            for name, arm in chosen.items():
                seconds[name].append(token_seconds(arm, config, steps, compiled))
    measurements = measure(seconds)
    text = verdict(measurements)
    write_result(
        out,
        experiment="process_scaling",
        question=QUESTION,
        config=settings,
        measurements=measurements,
        verdict=text,
    )
    print(f"{table(measurements)}\n\n{text}\n{out}/result.json")


if __name__ == "__main__":
    program(main)
