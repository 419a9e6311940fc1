"""SIGKILL at random moments: the same command continues, bit for bit."""

import random
import signal
import time
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, VARIANTS, Bench, choice
from tests.campaign.checks import finished
from tests.campaign.shim import Faults

BUDGETS = ("120kB", "130kB", "10MB")


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """One to three kills of a run, fresh or stopped, and then the run to its end."""
    variant = list(VARIANTS)[number % len(VARIANTS)]
    options = bench.options(variant, place)
    if rng.random() < 0.5:
        options = bench.stopped(variant, place, newest=rng.choice((6, 9, STEPS)))
    else:
        bench.run(variant)
    for _ in range(rng.randint(1, 3)):
        if bench.library and rng.random() < 0.7:
            at_a_call(bench, rng, place, variant, options)
        else:
            at_a_time(bench, rng, place, options)
        if variant == "tiered":  # budgets may change between starts
            options = [*options, "--placement.device-budget", rng.choice(BUDGETS)]
    finished(bench, place, variant, options)


def at_a_call(
    bench: Bench, rng: random.Random, place: Path, variant: str, options: list[str]
) -> None:
    """A kill in front of a random call on the run's files, or in the middle of a write."""
    group, after = choice(rng, bench.run(variant).calls, without=("stat", "list", "read"))
    faults = Faults(
        path=f"{place}/[rc][ua]*",
        calls=group,
        after=after,
        times=1,
        signal=signal.SIGKILL,
        torn=int(group == "write" and rng.random() < 0.5),
    )
    program = bench.start(place, options, faults).wait(LIMIT)
    assert program.code in (0, -signal.SIGKILL), program.error_output()[-1000:]


def at_a_time(bench: Bench, rng: random.Random, place: Path, options: list[str]) -> None:
    """A kill after a random time, while training more often than before it."""
    program = bench.start(place, options)
    lines = place / "run" / "metrics.jsonl"
    least = rng.choice((0, 1, 4, 7, 10))
    program.wait_until(lambda: _count(lines) >= least, LIMIT)
    time.sleep(rng.random() * rng.choice((0.01, 0.3, 2.0)))
    program.kill()
    assert program.code in (0, -signal.SIGKILL), program.error_output()[-1000:]


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
