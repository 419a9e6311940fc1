"""SIGINT and SIGTERM, once and twice: what was done is saved, and the same command goes on."""

import random
import signal
import time
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, Bench, losses
from tests.campaign.checks import checkpoints, ended_well, finished, kept, shortened
from tests.campaign.server import Program

VARIANTS = ("plain", "tiered", "student")
SECONDS_TO_END = 20.0
"""From a signal to the end, with a last save. A second signal leaves a quarter of it."""


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """A signal, or two, at a random time of a run, fresh or stopped."""
    variant = VARIANTS[number % len(VARIANTS)]
    bench.run(variant)
    options = bench.options(variant, place)
    if rng.random() < 0.5:
        options = bench.stopped(variant, place, newest=6)
    before = checkpoints(place / "run")
    first = rng.choice((signal.SIGINT, signal.SIGTERM))
    second = rng.choice((None, None, signal.SIGINT, signal.SIGTERM))
    try:
        interrupt(bench, rng, place, variant, options, (first, second))
        kept(before, place / "run", before)
        finished(bench, place, variant, options)
    except (AssertionError, TimeoutError) as error:
        names = " then ".join(s.name for s in (first, second) if s)
        raise AssertionError(f"{variant}, {names}: {error}") from None


def interrupt(
    bench: Bench,
    rng: random.Random,
    place: Path,
    variant: str,
    options: list[str],
    signals: tuple[signal.Signals, signal.Signals | None],
) -> None:
    """Sends the signals while the run trains, and checks how it ends."""
    run = place / "run"
    program = bench.start(place, options)
    least = max(losses(run), default=0) + rng.choice((0, 1, 1, 3))
    trains = program.wait_until(lambda: max(losses(run), default=0) >= least, LIMIT)
    time.sleep(rng.random() * 0.05)
    program.send(signals[0])
    if signals[1]:
        time.sleep(rng.choice((0.01, 0.1)))
        program.send(signals[1])
    begin = time.monotonic()
    program.wait(LIMIT)
    seconds = time.monotonic() - begin
    limit = SECONDS_TO_END / 4 if signals[1] else SECONDS_TO_END
    assert seconds < limit, f"it lived {seconds:.0f} s after the signal"
    # Python itself ends like this before our program has begun, and at once at a second signal.
    if program.code not in (-signals[0], -(signals[1] or 0)) or least:
        stopped_well(bench, program, place, variant)
    if trains and least and not signals[1] and program.code:
        saved_last(run)


def stopped_well(bench: Bench, program: Program, place: Path, variant: str) -> None:
    """The right result, or the exit code of the signal and a few words on what is kept."""
    if program.code not in (130, 143):
        ended_well(bench, program, place, variant)
        return
    said = program.error_output()
    lines = [line for line in said.splitlines() if line.strip()]
    assert "Traceback" not in said + program.output(), f"a traceback: {shortened(lines)}"
    assert 1 <= len(lines) <= 3, f"{len(lines)} lines: {shortened(lines)}"


def saved_last(run: Path) -> None:
    """The newest checkpoint holds every step that metrics.jsonl tells of."""
    steps = [int(p.parent.name) for p in (run / "checkpoints").glob("[0-9]*/MANIFEST.json")]
    last = max(losses(run), default=0)
    newest = max(steps, default=0)
    assert newest >= last, f"steps up to {last} were done, and the newest checkpoint is {newest}"
    assert newest <= STEPS
