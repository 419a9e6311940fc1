"""metrics.jsonl: one JSON object a step, in order, also across kills and resumptions."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.base.console import say
from moe_jax.base.files import write_atomically
from moe_jax.moe.layer import RouterStats
from moe_jax.train.state import Metrics

NumberedLine = tuple[int, dict[str, Any] | None, bytes]
"""(number from 1, the line as an object, its bytes). None in place of a damaged line."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, without those that cannot be read.

    A last line that a kill cut off is normal. Any other damaged line is named.
    """
    for number, line, raw in _numbered_lines(path):
        if line is not None:
            yield line
        elif raw.endswith(b"\n"):
            say(f"{path}: line {number} is damaged and left out")


def _numbered_lines(path: Path) -> Iterator[NumberedLine]:
    """The lines of a file in order."""
    if not path.exists():
        return
    # Bytes, because a damaged line need not be UTF-8.
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            line = json.loads(raw)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError
            line = None
        usable = isinstance(line, dict) and type(line.get("step")) is int
        yield number, line if usable else None, raw


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON cannot express (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends one line a step. Lines after step `resume_after` are removed first.

    They belong to updates that the checkpoint does not have, and that are done again. Damaged lines
    are moved to a file beside it, whose name ends in .damaged.
    """

    def __init__(self, path: Path, resume_after: int) -> None:
        numbered = list(_numbered_lines(path))
        _set_damaged_aside(path, numbered)
        lines = (line for _, line, _ in numbered if line is not None)
        kept = [line for line in lines if line["step"] <= resume_after]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one object and flushes it to the operating system, where a kill spares it."""
        self._file.write(json.dumps(finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flushes to disk. It is called before a checkpoint relies on the lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class NoMetricsFile:
    """In place of MetricsFile in every process but the first."""

    def write(self, line: dict[str, Any]) -> None:
        """Does nothing."""

    sync = close = lambda self: None


def _set_damaged_aside(path: Path, numbered: list[NumberedLine]) -> None:
    """Adds the damaged lines to PATH.damaged, and says so. The last line may be cut off."""
    damaged = [(n, raw) for n, line, raw in numbered if line is None and raw.endswith(b"\n")]
    if not damaged:
        return
    aside = path.with_name(f"{path.name}.damaged")
    with aside.open("ab") as file:
        file.writelines(raw for _, raw in damaged)
    numbers = ", ".join(str(number) for number, _ in damaged[:10])
    more = ", …" if len(damaged) > 10 else ""
    say(f"{path}: damaged lines ({numbers}{more}) are moved to {aside.name}, the others are kept")


def imbalance(load: np.ndarray) -> np.ndarray:
    """max / mean load over the experts of each layer. 1 is perfect balance."""
    # 1e-9: a layer without any assignment has imbalance 0.
    return load.max(axis=-1) / np.maximum(load.mean(axis=-1), 1e-9)


def describe(step: int, metrics: Metrics, with_load: bool) -> dict[str, Any]:
    """One line of metrics.jsonl. Losses are in nats per token, and floats keep full precision.

    router_entropy, load_imbalance and device_imbalance are lists over layers, in the order of the
    blocks and with multi-token prediction last. device_imbalance is the highest over the mean
    number of assignments that a device computes, where tokens travel to their experts. `load`, the
    assignments per layer and expert, is large, so it is there only with `with_load`.
    """
    # One transfer for all of them. It waits until the update is computed.
    metrics = jax.device_get(metrics)
    line: dict[str, Any] = {
        "step": step,
        "loss": float(metrics.loss),
        "cross_entropy": float(metrics.cross_entropy),
        "gradient_norm": float(metrics.gradient_norm),
        "learning_rate": float(metrics.learning_rate),
        "skipped_in_a_row": int(metrics.skipped),
        "balance_loss": float(metrics.balance),
        "mtp_loss": float(metrics.mtp),
    }
    if metrics.distillation is not None:
        line["distillation_loss"] = float(metrics.distillation)
    if metrics.stats:
        layers = _all_layers(metrics.stats)
        line["load_imbalance"] = imbalance(np.asarray(layers.load)).tolist()
        line["dropped"] = int(np.sum(layers.dropped))
        line["exchange_waited"] = int(np.sum(layers.waited))
        if np.any(layers.busiest):
            computed = np.sum(layers.load, axis=-1) - layers.dropped
            line["device_imbalance"] = (layers.busiest / np.maximum(computed, 1)).tolist()
        line["router_entropy"] = np.asarray(layers.entropy).tolist()
        line["router_bias_max"] = float(metrics.router_bias)
        if with_load:
            line["load"] = np.asarray(layers.load).tolist()
    return line


def _all_layers(stats: dict[str, RouterStats]) -> RouterStats:
    parts = [stats[name] for name in ("sparse", "mtp") if name in stats]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
