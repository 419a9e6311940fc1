"""The folder of a run's checkpoints: which steps are there, which can be used, which may go.

DIR/checkpoints holds a folder for each step, named by its number. Other names are no steps: the
folder of unfinished checkpoints, and those that were set aside, such as damaged-200.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.base.errors import UserError
from moe_jax.base.files import ANSWERS, disk_fault, patiently
from moe_jax.base.scratch import make_scratch
from moe_jax.config import TrainConfig, from_dict
from moe_jax.train.checkpoint.manifest import is_complete, manifest_fault

VALIDATION = "validation_bits_per_byte"
EXPERTS = "experts"
"""Folder inside a checkpoint with the files of Engine.save_beside."""
STATE = "state"
EXTRA = "extra/metadata"
METRICS = "metrics/metrics"
FORMAT = 2
"""Version of the checkpoints. Version 1 named parameters and derived random keys differently."""
CONTENTS = ("config", "tokenizer", "data_fingerprint", "data_stats", "data_state")
"""Entries of `extra` without which a run cannot continue."""

Extra = dict[str, Any]
"""Saved beside the state: config, data position, tokenizer. JSON-serialisable."""


class Passed(NamedTuple):
    """A checkpoint that is passed over."""

    step: int
    kind: str
    """`damaged`: its bytes are not those that were written. `unusable`: they are, and this version
    of moe_jax cannot go on from them."""
    reason: str


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """Turns a failed read inside the block into a UserError. Other errors pass through."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ANSWERS) or disk_fault(error) is None:
            raise
        raise UserError(
            f"cannot read {error.filename or folder}: {error.strerror}. Nothing was changed: mend "
            "that, then give the same command again"
        ) from error


def unfinished_folder(out: Path) -> Path:
    """Where a run in the folder `out` writes checkpoints until they are complete."""
    return out / "checkpoints" / "unfinished"


def steps_in(checkpoints: Path) -> list[int]:
    """The steps that have a folder, ascending. OSError: the folder cannot be read."""
    try:
        names = patiently(lambda: os.listdir(checkpoints))
    except FileNotFoundError:
        return []
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    return sorted(number for number in numbers if str(number) in names)  # 07 is no step


def examine(folder: Path) -> Extra | Passed:
    """`extra` of a checkpoint whose files are as they were written and that this version can use.

    OSError: a file cannot be read.
    """
    step = int(folder.name)
    if fault := manifest_fault(folder):
        return Passed(step, "damaged", fault)
    try:
        extra = json.loads(patiently((folder / EXTRA).read_bytes))
    except (*ANSWERS, ValueError):
        return Passed(step, "damaged", f"{EXTRA} is missing")
    problem = _problem(extra)
    return Passed(step, "unusable", problem) if problem else extra


def _problem(extra: Any) -> str | None:
    """Why this version cannot continue from a checkpoint that is as it was written."""
    remedy = "choose another --out, or use the version that wrote it"
    if not isinstance(extra, dict):
        return f"another version of moe_jax wrote it: {remedy}"
    written = extra.get("format", 1)
    if written != FORMAT:
        age = "a newer" if isinstance(written, int) and written > FORMAT else "another"
        return (
            f"{age} version of moe_jax wrote it in format {written!r:.20}, this one reads format "
            f"{FORMAT}: {remedy}"
        )
    missing = [name for name in CONTENTS if name not in extra]
    if missing:
        return f"another version of moe_jax wrote it, without {missing[0]}: {remedy}"
    try:
        from_dict(TrainConfig, extra["config"])
    except UserError as error:
        return str(error)
    return None


def begin(folder: Path) -> None:
    """Makes the empty folder of an unfinished checkpoint. UserError: as make_scratch."""
    make_scratch(folder.parent)
    if folder.exists():  # an earlier save of this step failed
        shutil.rmtree(folder)
    folder.mkdir()


def set_aside(checkpoints: Path, step: int, kind: str) -> None:
    """Renames a step's folder to a name that is no step and that is free, such as damaged-200."""
    folder = checkpoints / str(step)
    if not os.path.lexists(folder):
        return
    target = checkpoints / f"{kind}-{step}"
    number = 2
    while os.path.lexists(target):
        target = checkpoints / f"{kind}-{step}-{number}"
        number += 1
    folder.rename(target)


def remove_old(checkpoints: Path, keep: int) -> None:
    """Removes checkpoints other than the newest ones and the best one.

    Only complete checkpoints are counted and removed. One that holds other files stays as well, and
    so does one whose metric cannot be read.
    """
    steps = [checkpoints / str(step) for step in steps_in(checkpoints)]
    complete = [folder for folder in steps if is_complete(folder)]
    bits = {folder: evaluated_bits(folder) for folder in reversed(complete)}
    measured = {folder: value for folder, value in bits.items() if value is not None}
    best = min(measured, key=lambda folder: measured[folder], default=None)  # the newest of equals
    for folder in complete[:-keep]:
        if folder in measured and folder != best:
            # Renamed first: a kill on the way leaves no half removed step.
            removed = make_scratch(unfinished_folder(checkpoints.parent)) / f"old-{folder.name}"
            folder.rename(removed)
            shutil.rmtree(removed)


def evaluated_bits(folder: Path) -> float | None:
    """Bits per byte, infinite if the checkpoint was not evaluated. None: they are unreadable."""
    try:
        return float(json.loads((folder / METRICS).read_bytes())[VALIDATION])
    except FileNotFoundError:
        return math.inf
    except (OSError, ValueError, KeyError, TypeError):
        return None
