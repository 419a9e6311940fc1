"""From runs to result.json: means and differences over seeds, tables, the files of a result."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.base.numbers import number_text
from moe_jax.base.result import Measurement, write_result
from moe_jax.study.arms import Runs, seed_values
from moe_jax.study.intervals import Interval, mean_interval, paired_interval
from moe_jax.study.plots import save_figures


def seed_mean(name: str, values: ArrayLike, *, unit: str, seeds: Sequence[int]) -> Measurement:
    """The mean of one value a seed, with its 95% interval."""
    array = np.asarray(values, float)
    found = mean_interval(array)
    used = list(seeds[: len(array)])
    return Measurement(name, found.mean, unit, seeds=used, interval=found.bounds)


def seed_difference(
    name: str,
    one: ArrayLike,
    other: ArrayLike,
    *,
    baseline: str,
    unit: str,
    seeds: Sequence[int],
) -> Measurement:
    """The mean of one - other over the seeds that both have, with its 95% interval."""
    first = np.asarray(one, float)
    second = np.asarray(other, float)
    found = paired_interval(first, second)
    used = list(seeds[: min(len(first), len(second))])
    return Measurement(name, found.mean, unit, baseline, seeds=used, interval=found.bounds)


@dataclass(frozen=True)
class Comparison:
    """The runs of arms that all have the same seeds, as measurements of one of their numbers."""

    runs: Runs
    seeds: Sequence[int]
    unit: str = "bits/byte"
    key: str = "bits"
    """The number's key in each run."""

    def mean(self, name: str, arm: str) -> Measurement:
        """An arm's mean."""
        values = seed_values(self.runs, arm, self.key)
        return seed_mean(name, values, unit=self.unit, seeds=self.seeds)

    def difference(self, name: str, arm: str, baseline: str, note: str = "") -> Measurement:
        """The mean of an arm's number less the baseline's. `note` follows the unit in brackets."""
        return seed_difference(
            name,
            seed_values(self.runs, arm, self.key),
            seed_values(self.runs, baseline, self.key),
            baseline=baseline,
            unit=f"{self.unit} ({note})" if note else self.unit,
            seeds=self.seeds,
        )

    def lowest(self, arms: Iterable[str]) -> str:
        """The arm of the lowest mean."""
        return min(arms, key=lambda arm: sum(seed_values(self.runs, arm, self.key)))


def interval_of(row: Measurement) -> Interval:
    """A measurement's mean and interval, with infinite bounds if it has no interval."""
    assert row.value is not None, f"{row.name} has no value"
    low, high = row.interval or (-np.inf, np.inf)
    return Interval(float(row.value), low, high)


def significance(row: Measurement) -> str:
    """A difference and whether its interval excludes 0, for a verdict: "-0.150 (significant)"."""
    found = interval_of(row)
    if row.interval is None:
        return f"{found.mean:+.3f} (one seed)"
    return f"{found.mean:+.3f} ({'' if found.excludes(0) else 'not '}significant)"


def table(measurements: Sequence[Measurement]) -> str:
    """One line a measurement: name, value, unit, interval."""
    lines = []
    for row in measurements:
        bounds = "" if row.interval is None else f"  [{', '.join(map(number_text, row.interval))}]"
        value = "none" if row.value is None else number_text(row.value)
        lines.append(f"{row.name:52} {value:>12} {row.unit}{bounds}")
    return "\n".join(lines)


def publish(
    out: Path,
    *,
    experiment: str,
    question: str,
    settings: Any,
    measurements: list[Measurement],
    verdict: str,
    figures: Mapping[str, Figure],
) -> None:
    """Writes out/result.json and out/plots/NAME.png, and prints the table and the verdict."""
    save_figures(figures, out / "plots", out.resolve().name)
    write_result(
        out,
        experiment=experiment,
        question=question,
        config=settings,
        measurements=measurements,
        verdict=verdict,
    )
    print(table(measurements))
    print(f"\n{verdict}\n{out}/result.json, plots/")


def read_measurements(path: Path) -> dict[str, Measurement]:
    """The measurements of a result.json by their names. An experiment of parts reads its parts."""
    content = json.loads(path.read_text())
    return {row["name"]: Measurement(**row) for row in content["measurements"]}
