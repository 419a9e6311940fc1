"""result.json: what an experiment asked, measured and concluded, in one form for all of them."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.base.machine import environment


@dataclass(frozen=True)
class Measurement:
    """One number. A speed is a `ratio` to a `baseline` that was measured in the same run."""

    name: str
    value: float | int | None
    unit: str
    baseline: str | None = None
    ratio: float | None = None
    seeds: list[int] | None = None
    interval: list[float] | None = None
    """[low, high]: the 95% interval of `value` over the seeds."""


def write_result(
    out: Path,
    *,
    experiment: str,
    question: str,
    config: Any,
    measurements: list[Measurement],
    verdict: str,
) -> None:
    """Writes out/result.json atomically, with the environment it was measured in."""
    content = {
        "experiment": experiment,
        "question": question,
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,  # pyright: ignore
        "environment": environment(),
        "measurements": [dataclasses.asdict(m) for m in measurements],
        "verdict": verdict,
    }
    write_atomically(out / "result.json", json.dumps(content, indent=1) + "\n")


def output_folder(out: str) -> Path:
    """`out` as a folder that exists and can be written; UserError where it cannot."""
    path = Path(out).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".writable", "")
        (path / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--out '{out}' cannot be written: {error.strerror or error}") from error
    return path
