"""Trials of all kinds in turns, and their table."""

import argparse
import random
import shutil
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from moe_jax.base.console import Throttle, duration
from tests.campaign.bench import Bench, bench
from tests.campaign.kinds import KINDS
from tests.campaign.kinds.disk import mounts


@dataclass
class Tally:
    """What became of the trials of one kind."""

    trials: int = 0
    inputs: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def usable(names: list[str], folder: Bench) -> list[str]:
    """The kinds that this machine allows. A line says why another is left out."""
    found = []
    for name in names:
        needs = KINDS[name].needs
        if needs == "compiler" and folder.library is None:
            print(f"{name}: left out, there is no C compiler here")
        elif needs == "mount" and not mounts():
            print(f"{name}: left out, only root can mount a small disk")
        else:
            found.append(name)
    return found


def one_trial(folder: Bench, name: str, seed: int, number: int) -> tuple[int, str | None]:
    """(inputs tried, what failed) of one trial."""
    rng = random.Random(f"{seed} {name} {number}")
    try:
        with folder.trial_folder(f"{name}-{number}") as place:
            return KINDS[name].trial(folder, rng, place, number) or 1, None
    except (AssertionError, TimeoutError) as error:
        return 1, str(error)
    except Exception as error:  # noqa: BLE001 (the other trials go on)
        place = traceback.extract_tb(error.__traceback__)[-1]
        return 1, f"the campaign itself: {error!r} in {place.filename}:{place.lineno}"


def campaign(
    folder: Bench, names: list[str], seconds: float, seed: int, only_trial: int | None = None
) -> dict[str, Tally]:
    """Trials of the kinds for so many seconds, each kind with its share of the time."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    end = time.monotonic() + seconds
    throttle = Throttle()
    while time.monotonic() < end:
        if throttle.ready():
            trials = sum(tally.trials for tally in tallies.values())
            failures = sum(len(tally.failures) for tally in tallies.values())
            left = duration(end - time.monotonic())
            print(f"{trials} trials, {failures} failures, {left} left", flush=True)
        name = min(names, key=lambda n: tallies[n].seconds / KINDS[n].share)
        tally = tallies[name]
        number = tally.trials if only_trial is None else only_trial
        begin = time.monotonic()
        inputs, failure = one_trial(folder, name, seed, number)
        tally.trials += 1
        tally.inputs += inputs
        tally.seconds += time.monotonic() - begin
        if failure:
            command = f"python tests/campaign.py --only {name} --seed {seed} --trial {number}"
            tally.failures.append(failure)
            print(f"FAILED {name} {number}: {failure}\n  again: {command}", flush=True)
        if only_trial is not None and tally.trials and name == names[-1]:
            break
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """Trials and failures by kind."""
    rows = [("kind", "trials", "inputs", "failed", "seconds")]
    for name, tally in tallies.items():
        numbers = (tally.trials, tally.inputs, len(tally.failures), round(tally.seconds))
        rows.append((name, *map(str, numbers)))
    sums = [sum(int(row[column]) for row in rows[1:]) for column in range(1, 5)]
    rows.append(("all", *map(str, sums)))
    return "\n".join(f"{row[0]:12}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def arguments(argv: list[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/campaign.py", description=description)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of all trials (default 0)")
    parser.add_argument("--only", default="", help=f"kinds: {','.join(KINDS)}")
    parser.add_argument("--trial", type=int, help="only this number of one kind")
    parser.add_argument("--keep", default="", help="folder to work in, which stays")
    chosen = parser.parse_args(argv)
    chosen.names = chosen.only.split(",") if chosen.only else list(KINDS)
    for name in chosen.names:
        if name not in KINDS:
            parser.error(f"unknown kind '{name}': use {', '.join(KINDS)}")
    return chosen


def main(argv: list[str], description: str) -> int:
    """Runs a campaign and prints its table. Returns the exit code."""
    chosen = arguments(argv, description)
    place = Path(chosen.keep or tempfile.mkdtemp(prefix="campaign-"))
    place.mkdir(parents=True, exist_ok=True)
    with bench(place) as folder:
        names = usable(chosen.names, folder)
        seconds = chosen.minutes * 60
        tallies = campaign(folder, names, seconds, chosen.seed, chosen.trial)
    print(table(tallies))
    failed = any(tally.failures for tally in tallies.values())
    if failed:
        print(f"the folders of failed trials are in {place / 'trials'}")
    elif not chosen.keep:
        shutil.rmtree(place)
    return int(failed)
