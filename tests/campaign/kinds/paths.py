"""Folders with odd names: they work, or they are refused before anything is written."""

import os
import random
from pathlib import Path

from tests.campaign.bench import LIMIT, Bench
from tests.campaign.checks import one_line, right, same, shortened, snapshot

NAMES = (
    *("v[1]", "a*b", "q?", "[!x]", "back\\slash", "sp ace", "{x}", "~", "~user", "%41", "#h"),
    *(
        "é",
        os.fsdecode(b"\xe9"),
        "$HOME",
        "-dash",
        "--out",
        "...",
        "a:b",
        "a,b",
        "file:",
        "'\"",
        "(x)",
    ),
    *(
        "[",
        "]",
        "12",
        "tab\there",
        "a\nb",
        "\U0001f600",
        "x" * 200,
        "a.orbax-checkpoint-tmp-0",
        "&;|",
    ),
)
PLACES = ("out", "above out", "cache", "texts")


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """One odd name in one of four places."""
    name = NAMES[number % len(NAMES)]
    where = rng.choice(PLACES)
    bench.run("plain")
    odd = place / "run" / name
    options = bench.options("plain", place)
    changed = {
        "out": ["--out", str(odd)],
        "above out": ["--out", str(odd / "below")],
        "cache": ["--data.cache", str(odd)],
        "texts": ["--data.source", f"files:{odd}/*.py"],
    }[where]
    (place / "run").mkdir()
    if where == "texts":
        options += ["--out", str(place / "run" / "here")]
        odd.symlink_to(bench.texts)
    before = snapshot(place / "run")
    program = bench.start(place, [*options, *changed]).wait(LIMIT)
    try:
        if program.code:
            one_line(program)
            same(before, snapshot(place / "run"))
            return
        loads(bench, place, where)
    except AssertionError as error:
        raise AssertionError(f"{where} {name!r}: {error}") from None


def loads(bench: Bench, place: Path, where: str) -> None:
    """The run can be opened by the name that it has. Its bits depend on the names of texts."""
    result = next((place / "run").rglob("result.json"), None)
    assert result is not None, "it says that it is finished and has no result.json"
    run = str(result.parent)
    program = bench.start(place, [run], script="tests/campaign/digest.py").wait(LIMIT)
    said = program.error_output().splitlines()
    assert program.code == 0, f"rc 0, and it does not load: {shortened(said)}"
    if where != "texts":
        (place / "found").mkdir()
        (place / "found" / "run").symlink_to(result.parent)
        right(bench, place / "found", bench.run("plain"))
