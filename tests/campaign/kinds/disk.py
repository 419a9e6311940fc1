"""Errors of the disk while a run is read, written and saved, and disks that are full."""

import contextlib
import errno
import os
import random
import subprocess
import tempfile
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, Bench, choice, relative_calls
from tests.campaign.checks import checkpoints, ended_well, finished, kept
from tests.campaign.shim import ERRORS, Call, Faults

VARIANTS = ("plain", "tiered", "plain", "cached student")
ROOM = 64 << 20
"""Bytes of a disk on which nothing is short."""


def trial_errors(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """A fault at a random call of a run, fresh or stopped. Then the same command without it."""
    variant = VARIANTS[number % len(VARIANTS)]
    options = bench.options(variant, place)
    bench.run(variant)
    if rng.random() < 0.8:
        options = bench.stopped(variant, place, newest=rng.choice((6, 9, STEPS)))
    before = checkpoints(place / "run")
    faults = choose(rng, place, bench.run(variant).calls)
    try:
        program = bench.start(place, options, faults).wait(LIMIT)
        kept(before, place / "run", before)
        ended_well(bench, program, place, variant)
        finished(bench, place, variant, options)
    except (AssertionError, TimeoutError) as error:
        log = place / "calls"
        hit = [f"{c.group} {c.path} ({c.library})" for c in relative_calls(log, place) if c.fault]
        raise AssertionError(f"{variant}: {faults} at {hit[:2]}: {error}") from None


def choose(rng: random.Random, place: Path, calls: list[Call]) -> Faults:
    """One call that fails, all calls from one on, or all calls of the first seconds."""
    group, after = choice(rng, calls)
    settings = {
        "path": f"{place}/[rc][ua]*",
        "calls": group,
        "errno": rng.choice(ERRORS[group]),
        "log": str(place / "calls"),
    }
    match rng.choice(("one", "from", "seconds", "kind of file")):
        case "one":
            settings |= {"after": after, "times": rng.choice((1, 1, 3))}
        case "from":
            settings |= {"after": after}
        case "seconds":
            reads = rng.choice(("read", "open,read", "open,read,stat,list"))
            number = rng.choice((errno.EIO, errno.ESTALE))
            settings |= {"calls": reads, "errno": number, "seconds": rng.choice((0.5, 1.5, 3.0))}
        case _:
            name = rng.choice([call.path for call in calls if call.group == group])
            settings |= {"path": f"{place}/{first_parts(name)}"}
    return Faults(**settings)


def first_parts(path: str) -> str:
    """A pattern for a path and its likes: numbers and hashes may be any."""
    parts = [part if part.isalpha() else "*" for part in path.split("/")]
    return "/".join(parts[:3]) + "*"


def mounts() -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid():
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


def trial_full(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """A run on a disk that fills up while it trains, and that gets room again afterwards."""
    variant = VARIANTS[number % len(VARIANTS)]
    bench.run(variant)
    mount("tmpfs", place, "-t", "tmpfs", "-o", f"size={ROOM}")
    try:
        options = bench.options(variant, place)
        if rng.random() < 0.5:
            options = bench.stopped(variant, place, newest=9)
        before = checkpoints(place / "run")
        program = bench.start(place, options)
        lines = place / "run" / "metrics.jsonl"
        moment = rng.choice((0, 1, 5, 8, 10))
        program.wait_until(lambda: lines.is_file() and _count(lines) >= moment, LIMIT)
        ballast = fill(place, rng.choice((0, 0, 4096, 20_000, 60_000)))
        program.wait(LIMIT)
        ballast.unlink()
        kept(before, place / "run", before)
        ended_well(bench, program, place, variant)
        finished(bench, place, variant, options)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"{variant}, full after {moment} lines: {error}") from None
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def fill(folder: Path, left: int) -> Path:
    """A file that leaves `left` bytes on the disk of `folder`."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        state = os.statvfs(folder)
        size = max(0, state.f_bavail * state.f_frsize - left)
        with contextlib.suppress(OSError):  # the run took some of it at this moment
            os.posix_fallocate(file.fileno(), 0, size)
    return ballast


def mount(source: str, place: Path, *options: str) -> None:
    subprocess.run(["mount", *options, source, str(place)], check=True, capture_output=True)
