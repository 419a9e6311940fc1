"""What must hold after a fault. Each check raises AssertionError with what it found."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from tests.campaign.bench import Bench, Undisturbed, losses
from tests.campaign.server import Program

LONGEST_ERROR = 1000
"""Letters of an `error:` line. Paths and a remedy take a few hundred."""
SECONDS_TO_END = 5.0
"""From an `error:` line to the end of the process."""
TEMPORARY = re.compile(r"\.tmp\b|\btmp[-.]|orbax-checkpoint-tmp|^\.(?!lock$|nfs)")
PLAIN_ENDS = (0, 1, 2, 130, 143)

Snapshot = dict[str, tuple[int, str]]


def snapshot(folder: Path) -> Snapshot:
    """Size and hash of every file below a folder, by its path. Folders have size -1."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file():
            found[name] = (-1, "")
        else:
            data = path.read_bytes()
            found[name] = (len(data), hashlib.sha256(data).hexdigest()[:16])
    return found


def same(before: Snapshot, after: Snapshot) -> None:
    """Nothing appeared, went or changed."""
    gone = sorted(before.keys() - after.keys())
    new = sorted(after.keys() - before.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    found = [*gone, *new, *changed]
    assert not found, f"gone {gone[:5]}, new {new[:5]}, changed {changed[:5]}"


def right(bench: Bench, place: Path, whole: Undisturbed, missing: int = 0) -> None:
    """place/run has the losses and the newest checkpoint of the undisturbed run, bit for bit.

    `missing`: how many lines of metrics.jsonl may be gone.
    """
    found = losses(place / "run")
    differ = [step for step, value in found.items() if whole.losses.get(step) != value]
    assert not differ, f"the losses of steps {differ} differ from the undisturbed run's"
    lost = sorted(whole.losses.keys() - found.keys())
    assert len(lost) <= missing, f"metrics.jsonl lacks the steps {lost}"
    digest = bench.digest(place)
    assert digest["step"] == whole.digest["step"], f"the newest checkpoint is {digest['step']}"
    arrays = whole.digest["arrays"]
    wrong = [name for name in arrays if digest["arrays"].get(name) != arrays[name]]
    assert not wrong, f"arrays of the checkpoint differ: {wrong[:3]}"


def clean(place: Path, whole: Undisturbed) -> None:
    """No temporary files lie around that an undisturbed run does not leave as well."""
    allowed = {path.name for path in whole.folder.rglob("*")}
    left = [
        str(path.relative_to(place))
        for name in ("run", "cache")
        for path in (place / name).rglob("*")
        if TEMPORARY.search(path.name) and path.name not in allowed
    ]
    assert not left, f"temporary files stay: {left[:5]}"


def finished(bench: Bench, place: Path, variant: str, options: list[str]) -> Program:
    """The same command, undisturbed: it ends well, with the right bits and nothing left behind."""
    whole = bench.run(variant)
    program = bench.start(place, options).wait(180)
    said = shortened(program.error_output().splitlines())
    assert program.code == 0, f"the next start ended with {program.code}: {said}"
    right(bench, place, whole)
    clean(place, whole)
    return program


def one_line(program: Program) -> None:
    """A program that failed says so in one `error:` line, and was gone soon after."""
    lines = [line for line in program.error_output().splitlines() if line.strip()]
    shown = shortened(lines)
    assert program.code in PLAIN_ENDS, f"it ended with {program.code}: {shown}"
    traceback = "Traceback" in program.output() + program.error_output()
    assert not traceback, f"a traceback among {len(lines)} lines: {shown}"
    assert len(lines) == 1, f"{len(lines)} lines of errors: {shown}"
    assert lines[0].startswith(("error: ", "interrupted")), f"no error line: {shown}"
    assert len(lines[0]) <= LONGEST_ERROR, f"an error line of {len(lines[0])} letters"
    seconds = program.error_seconds
    assert seconds < SECONDS_TO_END, f"it lived {seconds:.0f} s after its error line"


def shortened(lines: list[str]) -> str:
    """The last place in our code that a traceback names, the first and the last line."""
    own = [line.strip() for line in lines if "moe_jax/" in line and line.startswith("  File")]
    chosen = [*lines[:1], *own[-1:], *lines[-1:]]
    return " … ".join(dict.fromkeys(line[:300] for line in chosen))


def ended_well(bench: Bench, program: Program, place: Path, variant: str) -> None:
    """It has the right result or an error line, whichever its exit code says."""
    if program.code == 0:
        right(bench, place, bench.run(variant))
    else:
        one_line(program)


def checkpoints(run: Path) -> dict[str, Snapshot]:
    """The files of every checkpoint of a run, by its step. Folders of other names are not meant."""
    folders = sorted(path for path in (run / "checkpoints").glob("*") if path.is_dir())
    return {path.name: snapshot(path) for path in folders if path.name.isdigit()}


def kept(before: dict[str, Snapshot], run: Path, names: Iterable[str]) -> None:
    """The checkpoints `names` are where they were, whole."""
    now = checkpoints(run)
    lost = sorted(name for name in names if now.get(name) != before[name])
    assert not lost, f"checkpoints {lost} were good and are gone or changed: {sorted(now)}"


def set_aside(damaged: Snapshot, run: Path, name: str) -> None:
    """The files of the damaged checkpoint `name` are still there, in another folder."""
    folders = [path for path in run.rglob("*") if path.is_dir()]
    others = [path for path in folders if path != run / "checkpoints" / name]
    found = any(damaged.items() <= snapshot(path).items() for path in others)
    assert found, f"the damaged checkpoint {name} was not set aside: its files are gone"
