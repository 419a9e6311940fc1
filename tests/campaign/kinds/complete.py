"""Damage to the files that complete.py prepares: the same text, or one line."""

import random
import shutil
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, Bench, remove
from tests.campaign.checks import one_line
from tests.campaign.kinds.damage import DAMAGES, damages

SCRIPT = "experiments/complete.py"
TEXT = ("--tokens", "8", "--seed", "3", "--text", "def f")
_prepared: dict[Path, str] = {}


def text_of(printed: str) -> str:
    """What was written, without the figures below it."""
    return printed.rpartition("\n\n")[0]


def prepare(bench: Bench) -> tuple[Path, str]:
    """A finished run with its decode folder, and the text that it writes."""
    place = bench.folder / "prepared"
    if place not in _prepared:
        remove(place)
        place.mkdir()
        bench.stopped("plain", place, STEPS, report=True)
        program = bench.finish(place, [*TEXT, "--run", str(place / "run")], script=SCRIPT)
        _prepared[place] = text_of(program.output())
    return place / "run", _prepared[place]


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """Damages one file of decode/ or of the newest checkpoint, then writes twice."""
    run, text = prepare(bench)
    shutil.copytree(run, place / "run")
    newest = place / "run" / "checkpoints" / str(STEPS)
    decode = place / "run" / "decode"
    names = [p for p in (*decode.rglob("*"), *decode.rglob("*"), *newest.rglob("*")) if p.is_file()]
    path = sorted(names)[number * 7919 % len(names)]
    kind = rng.choice(damages(path))
    DAMAGES[kind](path, rng)
    extra = rng.choice(([], ["--placement.device-budget", "40kB"]))
    options = [*TEXT, *extra, "--run", str(place / "run")]
    try:
        for _ in range(2):
            program = bench.start(place, options, script=SCRIPT).wait(LIMIT)
            if program.code:
                one_line(program)
            else:
                # A damaged checkpoint is none of its business once decode/ is prepared.
                written = text_of(program.output()).removeprefix("\n")
                assert written.endswith(text), f"another text without a word: {written[-200:]!r}"
    except AssertionError as error:
        raise AssertionError(f"{path.relative_to(place)} {kind}: {error}") from None
