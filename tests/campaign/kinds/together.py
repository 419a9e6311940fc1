"""Two processes on one folder: one trains, the other is refused, and no bit differs."""

import random
import time
from pathlib import Path

from tests.campaign.bench import LIMIT, Bench
from tests.campaign.checks import clean, one_line, right

VARIANTS = ("plain", "tiered", "cached student")


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """Starts the same command twice, at once or one after the other."""
    variant = VARIANTS[number % len(VARIANTS)]
    whole = bench.run(variant)
    options = bench.options(variant, place)
    if rng.random() < 0.5:
        options = bench.stopped(variant, place, newest=6)
    first = bench.start(place, options)
    time.sleep(rng.choice((0.0, 0.01, 0.3, 1.5)))
    second = bench.start(place, options)
    for program in (first, second):
        program.wait(LIMIT)
        if program.code:
            one_line(program)
    codes = sorted((first.code, second.code), key=str)
    assert 0 in codes, f"{variant}: both were refused: {first.error_output()}"
    right(bench, place, whole)
    clean(place, whole)
