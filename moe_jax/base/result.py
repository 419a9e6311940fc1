"""result.json: question, measurements and verdict of an experiment, in one form for all of them."""

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.base.machine import environment
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import provenance


@dataclass(frozen=True)
class Measurement:
    """One number with its unit, and what it compares with."""

    name: str
    """Name by which tables and articles look the number up."""
    value: float | int | None
    """None: it could not be measured here."""
    unit: str
    baseline: str | None = None
    """Name of the quantity that `value` compares with, measured in the same run."""
    ratio: float | None = None
    """`value` relative to the baseline."""
    seeds: list[int] | None = None
    """Random seeds that `value` is the mean over."""
    interval: list[float] | None = None
    """[low, high]: 95% interval of `value` over the seeds."""


def write_result(
    out: Path,
    *,
    experiment: str,
    question: str,
    config: Any,
    measurements: list[Measurement],
    verdict: str,
) -> None:
    """Writes out/result.json atomically.

    `config` is a dataclass or a dictionary. Version, commit, command line, date and duration
    (base.provenance) and the environment (versions, devices) are added.
    """
    content = {
        "experiment": experiment,
        "question": question,
        **provenance(),
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,  # pyright: ignore
        "environment": environment(),
        "measurements": [dataclasses.asdict(m) for m in measurements],
        "verdict": verdict,
    }
    write_atomically(out / "result.json", json.dumps(content, indent=1) + "\n")


def output_folder(out: str, option: str = "--out") -> Path:
    """The folder `out`, created if need be. UserError: it cannot be created or written.

    `option` is what named it on the command line.
    """
    path = user_path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Only a written file proves it: permissions say nothing of a read-only or full disk. It
        # has no name of its own, so that it meets neither the user's files nor another process's.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{option} '{out}' cannot be written: {error.strerror or error}") from error
    return path
