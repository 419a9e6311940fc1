"""Damage to every file of a stopped run and of its caches, one file after another."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, Bench
from tests.campaign.checks import Snapshot, checkpoints, clean, kept, one_line, right, set_aside

VARIANTS = ("plain", "tiered", "cached student")
Damage = Callable[[Path, random.Random], None]


def _size(path: Path) -> int:
    return path.stat().st_size


def _empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def _cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(_size(path))])


def _remove(path: Path, _: random.Random) -> None:
    path.unlink()


def _zeros(path: Path, _: random.Random) -> None:
    path.write_bytes(bytes(_size(path)))


def _noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(_size(path)))


def _longer(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(99))


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 0x80
    path.write_bytes(bytes(data))


def _digit(path: Path, rng: random.Random) -> None:
    """Another digit or letter in place of one: what stays readable is the worst."""
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()] or range(len(data))
    place = rng.choice(list(places))
    data[place] = ord("7") if data[place] != ord("7") else ord("3")
    path.write_bytes(bytes(data))


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _other_json(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(("{}", "[]", "null", "3", '{"a": 1}', '{"a": [1, "b"]}', '"x"')))


DAMAGES: dict[str, Damage] = {
    "emptied": _empty,
    "cut": _cut,
    "a high bit": _flip,
    "a digit": _digit,
    "removed": _remove,
    "zeros": _zeros,
    "noise": _noise,
    "longer": _longer,
    "a folder": _folder,
    "other JSON": _other_json,
}
OF_EMPTY = ("longer", "removed", "a folder")
"""What can be done to an empty file."""
LOST_LINES = {"a high bit": 2, "longer": 1}
"""Lines of metrics.jsonl that a damage to the file may cost. All others: every line."""


def files(place: Path) -> list[Path]:
    """Every file of run and cache, from `place`, locks left out."""
    found = [p for part in ("run", "cache") for p in (place / part).rglob("*") if p.is_file()]
    return sorted(p.relative_to(place) for p in found if p.name != ".lock")


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """Damages one file, sometimes its like in every checkpoint, and continues the run."""
    variant = VARIANTS[number % len(VARIANTS)]
    newest = STEPS if rng.random() < 0.7 else 9  # from STEPS it is the shorter way
    options = bench.stopped(variant, place, newest, report=rng.random() < 0.3)
    names = files(place)
    # 7919 is a prime: it comes to every file, and neighbours are far apart.
    name = names[(number // len(VARIANTS)) * 7919 % len(names)]
    kind = rng.choice(damages(place / name))
    everywhere = name.parts[1] == "checkpoints" and rng.random() < 0.15
    good = checkpoints(place / "run")
    for target in [place / name, *(likes(place, name) if everywhere else [])]:
        DAMAGES[kind](target, rng)
    try:
        judge(bench, place, variant, options, good)
        judge_result(bench, place, variant, lost_lines(name, kind))
    except AssertionError as error:
        shown = "every checkpoint's " if everywhere else ""
        raise AssertionError(f"{variant}: {shown}{name} {kind}: {error}") from None


def damages(path: Path) -> list[str]:
    """What can be done to a file so that it can be noticed."""
    if not _size(path):
        return list(OF_EMPTY)
    # A line of metrics.jsonl with another digit is a good line.
    return [kind for kind in DAMAGES if (path.name, kind) != ("metrics.jsonl", "a digit")]


def lost_lines(name: Path, kind: str) -> int:
    """How many lines of metrics.jsonl may be gone."""
    return LOST_LINES.get(kind, STEPS) if name.name == "metrics.jsonl" else 0


def likes(place: Path, name: Path) -> list[Path]:
    """The same part of the other checkpoints, where it is not empty."""
    part = Path(*name.parts[3:])
    others = [p for p in (place / "run" / "checkpoints").iterdir() if p.name != name.parts[2]]
    return [p / part for p in others if (p / part).is_file() and _size(p / part)]


def judge(
    bench: Bench, place: Path, variant: str, options: list[str], good: dict[str, Snapshot]
) -> None:
    """Continues the run. It goes on from the best checkpoint, says so, and removes none."""
    run = place / "run"
    before = checkpoints(run)
    damaged = {step for step in before if before[step] != good[step]}
    program = bench.start(place, options).wait(LIMIT)
    kept(before, run, before.keys() - damaged)
    if program.code != 0:
        one_line(program)
        said = program.error_output()
        # Where nothing good is left, or a folder is in the way, a person has to decide.
        assert damaged == before.keys() or "directory" in said, f"it could go on: {said}"
    elif (newest := max(before, key=int)) in damaged:
        said = program.output() + program.error_output()
        assert f"checkpoint {newest}" in said, f"nothing was said about checkpoint {newest}"
        set_aside(before[newest], run, newest)


def judge_result(bench: Bench, place: Path, variant: str, missing: int) -> None:
    """The right bits, if the run says that it is finished."""
    run = place / "run"
    if (run / "result.json").exists():
        right(bench, place, bench.run(variant), missing)
        clean(place, bench.run(variant))
        json.loads((run / "result.json").read_text())
