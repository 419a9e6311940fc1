"""Lever 2, training: how many times larger a model trains in the same memory with tiers?

    python experiments/hot_cold/training_capacity.py [--out DIR] [--quick] [--seed N]

Trains one model thrice, each time in a process of its own (training_worker.py): all resident, with
a device budget of a quarter of the experts' state, and with that budget and blocking copies.
README.md beside this file says how memory and speed are measured.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.hot_cold.training_figures import Runs, draw_timeline, summarise, training_verdict
from experiments.hot_cold.training_worker import Job, Kind, Size, direct_works, run_worker
from moe_jax.base.console import track
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.study.results import publish

QUESTION = "How many times larger a model trains in the same memory with experts in tiers?"
KINDS: tuple[Kind, ...] = ("resident", "tiers", "blocking")

FULL = Size(width=256, hidden=256, layers=8, experts=32, batch=8, rounds=3, updates=3)
QUICK = Size(width=128, hidden=96, layers=8, experts=32, batch=4, rounds=1, updates=3)


@dataclass(frozen=True)
class Settings:
    """Trains a model all resident and with a quarter of its experts' state resident."""

    out: str = "runs/training-capacity"
    """Folder for result.json and the experts on disk."""
    seed: int = 0
    """Seed of the parameters and tokens."""
    quick: bool = False
    """A smaller model, fewer rounds."""


class Capacity(NamedTuple):
    """What was measured."""

    measurements: list[Measurement]
    verdict: str
    figure: Figure
    """Timeline of the last update."""


def measure(size: Size, seed: int, out: Path) -> Capacity:
    """All rounds. run.py calls it, too."""
    direct = direct_works(out)
    jobs = {kind: Job(size, seed, str(out), direct, kind) for kind in KINDS}
    compiled = out / "compiled"
    # Fills the compilation cache, so that no compiler is in the measured memory.
    for job in jobs.values():
        run_worker(replace(job, size=replace(size, updates=1)), compiled)
    runs: Runs = {kind: [] for kind in KINDS}
    for _ in track(range(size.rounds), "rounds"):
        for kind, job in jobs.items():
            runs[kind].append(run_worker(job, compiled))
    measurements = summarise(jobs["tiers"], runs)
    return Capacity(measurements, training_verdict(measurements, direct), draw_timeline(runs))


def main(argv: list[str]) -> None:
    """Parses, measures, reports."""
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0])
    out = output_folder(settings.out)
    size = QUICK if settings.quick else FULL
    found = measure(size, settings.seed, out)
    publish(
        out,
        experiment="training_capacity",
        question=QUESTION,
        settings={**asdict(settings), **asdict(size)},
        measurements=found.measurements,
        verdict=found.verdict,
        figures={"training_timeline": found.figure},
    )


if __name__ == "__main__":
    program(main)
