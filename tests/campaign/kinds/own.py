"""The user's own files in the folders of a run: they stay, whatever their names are."""

import random
from pathlib import Path

from tests.campaign.bench import Bench
from tests.campaign.checks import finished
from tests.campaign.kinds.kill import at_a_time

VARIANTS = ("tiered", "plain", "cached student")
NAMES = (
    "run/shelf/weights.bin",
    "run/experts/notes.txt",
    "run/experts-5.txt",
    "run/decode/notes.txt",
    "run/plots/mine.png",
    "run/notes/shelf/a",
    "run/checkpoints/notes.txt",
    "run/checkpoints/old/notes.txt",
    "run/checkpoints/best-7/notes.txt",
    "run/metrics.jsonl.bak",
    "run/draft",
    "cache/notes.txt",
    "cache/old/notes.txt",
    "tiers/notes.txt",
    "tiers/shelf/notes.txt",
    "tiers/layer_00.txt",
)


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """A run beside files of others: fresh or stopped, killed once, and finished."""
    variant = VARIANTS[number % len(VARIANTS)]
    bench.run(variant)
    options = bench.options(variant, place)
    if rng.random() < 0.5:
        options = bench.stopped(variant, place, newest=9)
    if variant == "tiered":
        options += ["--placement.folder", str(place / "tiers")]
    for name in NAMES:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
    try:
        if rng.random() < 0.7:
            at_a_time(bench, rng, place, options)
        finished(bench, place, variant, options)
    finally:
        lost = [name for name in NAMES if not intact(place, name)]
    assert not lost, f"{variant}: it removed or changed {lost}"


def intact(place: Path, name: str) -> bool:
    path = place / name
    return path.is_file() and path.read_text() == f"mine: {name}"
