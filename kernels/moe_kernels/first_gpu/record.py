"""What a run has found, on disk after every step, and as a table at its end."""

import json
from pathlib import Path
from typing import Any

from moe_kernels.files import write_json
from moe_kernels.first_gpu.context import Measurement, Outcome

Interval = tuple[float, float]


class Predictions:
    """Seconds of launches and layers that were predicted before, each as an interval."""

    def __init__(self, path: Path) -> None:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.device: str = content.get("device", "")
        self.intervals: dict[tuple[str, ...], Interval] = {}
        for keys, rows in (
            (("shape", "launch"), content.get("launches", [])),
            (("shape", "kind", "implementation"), content.get("layers", [])),
        ):
            for row in rows:
                key = tuple(row[name] for name in keys)
                self.intervals[key] = (row["seconds_low"], row["seconds_high"])

    def interval(self, m: Measurement) -> Interval | None:
        """What was predicted for a measurement, None where nothing was."""
        if "launch" in m:
            return self.intervals.get((m["shape"], m["launch"]))
        if "implementation" in m:
            return self.intervals.get((m["shape"], m["kind"], m["implementation"]))
        return None

    def judged(self, m: Measurement, device: str) -> Measurement:
        """The measurement with `predicted_low`, `predicted_high` and `inside`.

        Unchanged where nothing was predicted, or for another device than the one at hand.
        """
        found = self.interval(m)
        if found is None or self.device not in device:
            return m
        low, high = found
        inside = low <= m["value"] <= high
        return {**m, "predicted_low": low, "predicted_high": high, "inside": inside}


class Record:
    """The file first_gpu.json: environment, steps and measurements."""

    def __init__(self, path: Path, head: dict[str, Any], predictions: Predictions) -> None:
        self.path = path
        self.predictions = predictions
        self.environment: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.measurements: list[Measurement] = []
        self._head = head

    def add_measurement(self, measurement: Measurement) -> None:
        """Adds it, beside what was predicted, and writes the file."""
        device = self.environment.get("device", "")
        self.measurements.append(self.predictions.judged(measurement, device))
        self.write()

    def add_step(self, name: str, outcome: Outcome, seconds: float, allowed: float) -> None:
        """Adds it and writes the file."""
        step = {"name": name, "ok": outcome.ok, "seconds": round(seconds, 2)}
        step |= {"deadline": round(allowed, 1), "reason": outcome.reason, **(outcome.details or {})}
        self.environment |= step.pop("environment", {})
        self.steps.append(step)
        self.write()

    def skip(self, name: str, reason: str) -> None:
        """Adds a step that was not run."""
        self.add_step(name, Outcome(False, reason), 0.0, 0.0)

    def write(self) -> None:
        """Writes the file under another name and renames it."""
        content = {
            **self._head,
            "environment": self.environment,
            "steps": self.steps,
            "measurements": self.measurements,
        }
        write_json(self.path, content)

    def table(self) -> str:
        """Steps, then measurements, for a person."""
        title = "DRY RUN: tiny sizes in the interpreter" if self._head.get("dry_run") else ""
        lines = ["", title, f"{'measurement':58} {'value':>10}  unit"]
        lines += [_measured(m) for m in self.measurements]
        judged = [m["inside"] for m in self.measurements if "inside" in m]
        if judged:
            lines.append(f"predictions: {sum(judged)} of {len(judged)} measurements inside")
        elif self.predictions.intervals:
            lines.append(f"predictions: for {self.predictions.device}, compared with nothing here")
        lines += ["", f"{'step':20} {'result':7} {'seconds':>8}  reason"]
        for step in self.steps:
            result = "ok" if step["ok"] else "FAILED"
            lines.append(f"{step['name']:20} {result:7} {step['seconds']:8.1f}  {step['reason']}")
        return "\n".join([*lines, f"{self.path}"])


def _measured(m: Measurement) -> str:
    line = f"{m['name']:58} {m['value']:10.4g}  {m['unit']}"
    for key in ("teraflops", "of_gemm", "of_copy"):
        if m.get(key) is not None:
            line += f"  {key} {m[key]:.3g}"
    if "inside" in m:
        word = "inside" if m["inside"] else "OUTSIDE"
        line += f"  {word} {m['predicted_low']:.3g} to {m['predicted_high']:.3g}"
    return line
