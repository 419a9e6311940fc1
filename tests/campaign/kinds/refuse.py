"""Commands that are refused: one line, and nothing on the disk has changed."""

import random
import shutil
from pathlib import Path

from tests.campaign.bench import LIMIT, STEPS, Bench
from tests.campaign.checks import one_line, same, snapshot

STATES = ("new", "stopped", "finished")
WRONG = (
    ("--model.moe.experts-per-token", "99"),
    ("--model.attention.kv-heads", "3"),
    ("--model.moe.groups", "5"),
    ("--data.source", "files:/nowhere/*.txt"),
    ("--data.source", "hf:"),
    ("--model.moe.expert", "4"),
    ("--model.vocabulary", "100"),
    ("--model.width", "-3"),
    ("--seed", "-1"),
    ("--batch", "0"),
    ("--data.length", "0"),
    ("--data.length", "1000000"),
    ("--data.validation-fraction", "0"),
    ("--data.tokenizer", "bpe:3"),
    ("--data.tokenizer", "bpe:²"),
    ("--data.cache", "/proc/cache"),
    ("--distill.teacher", "/nowhere"),
    ("--distill.teacher", "{place}"),
    ("--placement.device-budget", "1kB"),
    ("--placement.device-budget", "many"),
    ("--optim.learning-rate", "nan"),
    ("--optim.accumulation", "7"),
    ("--checkpoint.keep", "1"),
    ("--steps", "zwölf"),
    ("--model.moe.experts", "9" * 30),
    ("--model.layers", "1000000000"),
    ("nonsense",),
    ("--out",),
    ("--out", "/proc/run"),
    ("--out", "{place}/file"),
    ("--out", "{place}/file/below"),
)
"""Refused for any run."""
DIFFERENT = (
    ("--model.width", "24"),
    ("--seed", "5"),
    ("--batch", "4"),
    ("--data.length", "32"),
    ("--data.source", "files:{texts}/module1*.py"),
    ("--data.tokenizer", "bpe:300"),
    ("--placement.device-budget", "130kB"),
    ("--distill.teacher", "{teacher}"),
    ("--optim.learning-rate", "0.5"),
)
"""Refused for a run that began otherwise."""


def trial(bench: Bench, rng: random.Random, place: Path, number: int) -> None:
    """A wrong option for a new run, a stopped one, or a finished one."""
    cases = [(option, state) for state in STATES for option in options_of(state)]
    extra, state = cases[number * 7919 % len(cases)]
    words = [w.format(place=place, texts=bench.texts, teacher=bench.teacher) for w in extra]
    options = [*prepare(bench, place, state), *words]
    (place / "file").write_text("a file")
    folders = (place / "run", place / "cache") if state != "new" else (place / "run",)
    before = [snapshot(folder) for folder in folders]
    program = bench.start(place, options).wait(LIMIT)
    # A new run that is refused for its text has locked its folder by then, and no more.
    empty = place / "run" / "new"
    if empty.is_dir() and [path.name for path in empty.iterdir()] == [".lock"]:
        shutil.rmtree(empty)
    try:
        assert program.code != 0, "it was not refused"
        one_line(program)
        for folder, then in zip(folders, before, strict=True):
            same(then, snapshot(folder))
    except AssertionError as error:
        raise AssertionError(f"{state} run, {' '.join(extra)}: {error}") from None


def options_of(state: str) -> tuple[tuple[str, ...], ...]:
    return WRONG if state == "new" else (*WRONG, *DIFFERENT)


def prepare(bench: Bench, place: Path, state: str) -> list[str]:
    """The options of a run in this state, which is put into `place`."""
    if state != "new":
        newest = STEPS if state == "finished" else 9
        return bench.stopped("plain", place, newest, report=True)
    (place / "run").mkdir()
    return [*bench.options("plain", place), "--out", f"{place}/run/new"]
