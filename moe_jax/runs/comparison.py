"""Runs side by side: where they are, how fast and how even they were, how their settings differ."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.console import say
from moe_jax.base.errors import require
from moe_jax.base.numbers import amount_text
from moe_jax.config import CheckpointConfig, TrainConfig, fields, from_dict
from moe_jax.runs.load import run_folder
from moe_jax.train.checkpoint import VALIDATION, Checkpoints
from moe_jax.train.metrics import read_lines

LAST = 50
"""Updates that the speed is the median of."""


@dataclass(frozen=True)
class Looked:
    """A run as its folder shows it, finished or not."""

    name: str
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    config: TrainConfig | None
    """None: the run has neither a report nor a checkpoint yet."""
    measured: dict[str, Any]
    """The measurements of its report, by name."""


def look(out: str) -> Looked:
    """Reads a run's folder. UserError: it is no run's."""
    folder = run_folder(out)
    lines = list(read_lines(folder / "metrics.jsonl"))
    require(bool(lines), f"{out} holds no metrics.jsonl: give the --out of a training run")
    result = _report(folder)
    saved = result.get("config") or _saved_config(folder)
    config = None if saved is None else from_dict(TrainConfig, saved)
    measured = {row["name"]: row["value"] for row in result.get("measurements", [])}
    return Looked(str(out).rstrip("/"), lines, config, measured)


def _report(folder: Path) -> dict[str, Any]:
    """result.json, or nothing where the run has not ended."""
    try:
        return json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _saved_config(folder: Path) -> dict[str, Any] | None:
    """The settings in the newest checkpoint."""
    if not (folder / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(folder, CheckpointConfig(), read_only=True)
    try:
        extra = checkpoints.peek(say)
    finally:
        checkpoints.close()
    return None if extra is None else extra["config"]


def short_names(runs: Sequence[Looked]) -> list[str]:
    """The folders' own names, or whole paths where two runs have the same one."""
    names = [Path(run.name).name for run in runs]
    return names if len(set(names)) == len(names) else [run.name for run in runs]


def quantities(run: Looked) -> dict[str, str]:
    """What a run has reached, as text. A quantity that is not known is left out."""
    last = run.lines[-1]
    total = run.config.last_step if run.config else "?"
    found: dict[str, str] = {"step": f"{last['step']} of {total}"}
    bits = column(run, VALIDATION)[1]
    speed = throughput(run)[1]
    numbers = {
        "held-out": (bits[-1] if bits else None, "bits/byte"),
        "best held-out": (min(bits, default=None), "bits/byte"),
        "loss": (last.get("loss"), "nats/token"),
        "throughput": (float(np.median(speed[-LAST:])) if speed else None, "tokens/s"),
        "training time": (last.get("elapsed"), "s"),
        "highest load / mean": (_worst(run, "load_imbalance"), ""),
        "lowest router entropy": (_worst(run, "router_entropy", lowest=True), "nats"),
        "dropped assignments": (_total(run, "dropped"), ""),
        "peak memory": (run.measured.get("peak_resident_bytes"), "bytes"),
        "GEMM fraction": (run.measured.get("gemm_fraction"), "of a plain GEMM"),
    }
    for name, (value, unit) in numbers.items():
        if value is not None:
            found[name] = " ".join(amount_text(value, unit)).strip()
    return found


def column(run: Looked, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines that have a number of this name. A list counts by its worst."""
    pairs = [(line["step"], line[name]) for line in run.lines if line.get(name) is not None]
    return [step for step, _ in pairs], [
        max(value) if isinstance(value, list) else value for _, value in pairs
    ]


def throughput(run: Looked) -> tuple[list[int], list[float]]:
    """(steps, tokens a second) from the time between updates."""
    timed = [line for line in run.lines if line.get("seconds") and line.get("tokens")]
    steps = [line["step"] for line in timed]
    return steps, [line["tokens"] / line["step"] / line["seconds"] for line in timed]


def _worst(run: Looked, name: str, *, lowest: bool = False) -> float | None:
    """The worst layer in the last line."""
    values = next((line[name] for line in reversed(run.lines) if line.get(name)), None)
    if values is None:
        return None
    return min(values) if lowest else max(values)


def _total(run: Looked, name: str) -> int | None:
    values = column(run, name)[1]
    return int(sum(values)) if values else None


def table(runs: Sequence[Looked]) -> dict[str, list[str]]:
    """quantity -> its text for each run, empty where it is not known."""
    found = [quantities(run) for run in runs]
    names = dict.fromkeys(name for own in found for name in own)
    return {name: [own.get(name, "") for own in found] for name in names}


def differences(runs: Sequence[Looked]) -> dict[str, list[str]]:
    """setting -> its value in each run, for the settings that are not the same in all.

    A run whose settings are not known has empty values and makes no difference.
    """
    settings = [fields(run.config) if run.config else {} for run in runs]
    known = [own for own in settings if own]
    rows = {}
    for name in dict.fromkeys(name for own in known for name in own):
        values = [repr(own.get(name)) for own in known]
        if name != "out" and len(set(values)) > 1:
            rows[name] = [str(own[name]) if own else "" for own in settings]
    return rows
