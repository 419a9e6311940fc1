"""Kills of sweep workers: the same command ends with the values of an undisturbed sweep."""

import json
import random
import signal
import time
from pathlib import Path

from tests.campaign.bench import LENGTH, LIMIT, SIZES, Bench
from tests.campaign.checks import one_line

SCRIPT = "experiments/sweep.py"
SEARCH = ("--search", "model.moe.expert-hidden=10,14", "--trials", "2")
_values: dict[Path, list[tuple[str, float]]] = {}


def options(bench: Bench, out: Path) -> list[str]:
    source = ["--data.source", f"files:{bench.texts}/*.py", "--data.cache", f"{bench.folder}/cache"]
    return ["train", *LENGTH, *SIZES, *source, *SEARCH, "--out", str(out)]


def values(out: Path) -> list[tuple[str, float]]:
    """(settings, objective) of every trial, from the files of the trials themselves."""
    found = []
    for path in sorted(out.glob("trial-*/result.json")):
        result = json.loads(path.read_text())
        bits = {m["name"]: m["value"] for m in result["measurements"]}["validation_bits_per_byte"]
        hidden = result["config"]["model"]["moe"]["expert_hidden"]
        found.append((str(hidden), bits))
    return sorted(found)


def undisturbed(bench: Bench) -> list[tuple[str, float]]:
    place = bench.folder / "sweep"
    if place not in _values:
        place.mkdir(exist_ok=True)
        bench.finish(place, options(bench, place / "out"), script=SCRIPT)
        _values[place] = values(place / "out")
    return _values[place]


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """One or two workers, killed once or twice, alone or with their run."""
    right = undisturbed(bench)
    command = options(bench, place / "out")
    for _ in range(rng.randint(1, 2)):
        workers = [bench.start(place, command, script=SCRIPT) for _ in range(rng.randint(1, 2))]
        time.sleep(rng.random() * 12)
        for program in workers:
            if rng.random() < 0.5:
                program.kill()
            else:
                program.send(signal.SIGTERM)
                program.wait(LIMIT)
    program = bench.start(place, command, script=SCRIPT).wait(2 * LIMIT)
    if program.code:
        one_line(program)
    assert program.code == 0, (
        f"the sweep ended with {program.code}: {program.error_output()[-500:]}"
    )
    found = values(place / "out")
    assert found == right, f"values {found} instead of {right}"
