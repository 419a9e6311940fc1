"""How far off are the predictions for published steps on GPUs?

    python experiments/prediction_check.py [--rows NAME …] [--out DIR]

Every row of moe_jax/predict/published.py is compiled and predicted as experiments/predict.py does.
Those of moe_jax/predict/published_pipelines.py have layouts of no program here, and are priced by
formula. Programs are cached, so a run that was stopped goes on with the rows that are missing.
"""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from moe_jax.base.startup import for_absent_gpus

if __name__ == "__main__":
    for_absent_gpus()
    # The compiler warns of memory in its own words.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from matplotlib.figure import Figure

from moe_jax.base.errors import near_name
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.predict.answer import answer, read_command
from moe_jax.predict.pipelines import PipelineRow, estimate
from moe_jax.predict.published import ROWS, Row
from moe_jax.predict.published_pipelines import PIPELINES
from moe_jax.study.results import publish

QUESTION = "How far off are the predictions for published steps on GPUs?"


@dataclass(frozen=True)
class Settings:
    """Compares predictions with published steps."""

    rows: tuple[str, ...] = ()
    """Names of rows of moe_jax/predict/published.py. Unset, all."""
    out: str = "runs/prediction_check"
    """Folder for result.json and the plot."""
    quick: bool = False
    """The row of the smallest program alone."""

    def __post_init__(self) -> None:
        known = [row.name for row in (*ROWS, *PIPELINES)]
        for name in self.rows:
            require(
                name in known,
                f"rows: unknown row {name}: use some of {', '.join(known)}{near_name(name, known)}",
            )


class Interval(NamedTuple):
    """Predicted seconds."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """A published step and its prediction. None: not published."""

    row: Row | PipelineRow
    predicted: Interval
    memory: int | None = None
    """Bytes on a device."""
    with_their_state: int | None = None
    """`memory` with their parameters, gradients and optimizer in place of ours."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Predicted seconds of products, of all other kernels, and of waiting for transfers."""

    @property
    def published_memory(self) -> float | None:
        """Bytes on a device."""
        return self.row.memory if isinstance(self.row, Row) else None

    @property
    def time_error(self) -> float | None:
        """Predicted over published seconds, less 1."""
        return _error(self.predicted.seconds, self.row.seconds)

    @property
    def memory_error(self) -> float | None:
        """Predicted over published bytes, less 1."""
        return _error(self.memory, self.published_memory)

    @property
    def stated_error(self) -> float | None:
        """memory_error with their state."""
        return _error(self.with_their_state, self.published_memory)


def _error(predicted: float | None, published: float | None) -> float | None:
    return None if predicted is None or published is None else predicted / published - 1


def check_of(row: Row | PipelineRow) -> Check:
    """Compiles a program, or takes the formula where no program of ours has the layout."""
    if isinstance(row, PipelineRow):
        return Check(row, Interval(*estimate(row)))
    found = answer(*read_command(row.argv))
    ours = found.memory.total
    theirs = ours + row.activations
    if row.state is not None:
        theirs += row.state.bytes(found.config.model) - found.memory.state
    prediction = found.prediction
    interval = Interval(prediction.seconds, prediction.low, prediction.high)
    line = prediction.line
    parts = {name: getattr(line, name) for name in ("products", "rest", "stalled")}
    return Check(row, interval, ours, theirs, parts)


def measurements(checks: Sequence[Check]) -> list[Measurement]:
    """Errors of a row, what they are of, and summary's numbers."""
    rows = []
    for check in checks:
        name = check.row.name
        way = "by formula" if isinstance(check.row, PipelineRow) else "compiled"
        use = f"{'calibrates' if check.row.calibrates else 'tests'}, {way}"
        if check.row.seconds is not None:
            predicted = check.predicted
            ends = [predicted.low, predicted.high]
            unit = "s, PREDICTED"
            rows.append(Measurement(f"{name}.time_error", check.time_error, f"relative, {use}"))
            rows.append(Measurement(f"{name}.seconds", predicted.seconds, unit, interval=ends))
            rows.append(Measurement(f"{name}.published_seconds", check.row.seconds, "s"))
            rows += [Measurement(f"{name}.{part}", s, unit) for part, s in check.parts.items()]
        if check.memory_error is not None:
            unit = "bytes, compiled, with stated terms"
            stated = f"{unit}, their state and activations by formula"
            rows.append(Measurement(f"{name}.memory_error", check.memory_error, "relative"))
            rows.append(
                Measurement(f"{name}.stated_memory_error", check.stated_error, "relative, stated")
            )
            rows.append(Measurement(f"{name}.bytes", check.memory, unit))
            rows.append(Measurement(f"{name}.stated_bytes", check.with_their_state, stated))
            rows.append(Measurement(f"{name}.published_bytes", check.published_memory, "bytes"))
    return rows + summary(checks)


def summary(checks: Sequence[Check]) -> list[Measurement]:
    """Medians and the worst."""
    tests = [check for check in checks if not check.row.calibrates and check.row.seconds]
    compiled = [check for check in tests if isinstance(check.row, Row)]
    formula = [check for check in tests if isinstance(check.row, PipelineRow)]
    within = [
        check.predicted.low <= check.row.seconds <= check.predicted.high
        for check in tests
        if check.row.seconds is not None
    ]
    unit = "relative, of rows that calibrate nothing"
    inside = sum(within) / len(within) if within else None
    memory = _sizes(check.memory_error for check in checks)
    stated = _sizes(check.stated_error for check in checks)
    times = _sizes(check.time_error for check in tests)
    return [
        Measurement("median_time_error", _median(times), unit),
        Measurement("worst_time_error", max(times, default=None), unit),
        Measurement(
            "median_time_error_compiled", _median(_sizes(c.time_error for c in compiled)), unit
        ),
        Measurement(
            "median_time_error_formula", _median(_sizes(c.time_error for c in formula)), unit
        ),
        Measurement("inside_interval", inside, "of rows"),
        Measurement("median_memory_error", _median(memory), "relative, all rows"),
        Measurement("worst_memory_error", max(memory, default=None), "relative, all rows"),
        Measurement("median_stated_memory_error", _median(stated), "relative, all rows, stated"),
    ]


def _sizes(errors: Iterable[float | None]) -> list[float]:
    return [abs(error) for error in errors if error is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def draw(checks: Sequence[Check]) -> Figure:
    """Predicted over published seconds, with intervals, on a line for each row."""
    timed = [check for check in checks if check.row.seconds is not None]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(timed)), layout="constrained")
    axes = figure.subplots()
    for place, check in enumerate(timed):
        published = check.row.seconds
        assert published is not None
        predicted = check.predicted
        ratio = predicted.seconds / published
        ends = [[ratio - predicted.low / published], [predicted.high / published - ratio]]
        color = "0.6" if check.row.calibrates else "C0"
        axes.errorbar(ratio, place, xerr=ends, fmt="o", color=color, capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(timed)), [check.row.name for check in timed], fontsize=8)
    axes.set_xlabel("predicted over published seconds (grey: calibrates)")
    return figure


def verdict(values: dict[str, float | int | None], checks: Sequence[Check]) -> str:
    """The errors."""

    def share(name: str) -> str:
        value = values[name]
        return "none" if value is None else f"{value:.0%}"

    return (
        f"PREDICTED for {len(checks)} published steps. Time: median error "
        f"{share('median_time_error')}, worst {share('worst_time_error')}, "
        f"{share('inside_interval')} of the rows inside of their interval. Memory: median error "
        f"{share('median_memory_error')}, and {share('median_stated_memory_error')} with their "
        "state in place of ours. Their programs differ from ours (published.py says how)."
    )


def main(argv: list[str]) -> None:
    """Compiles, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    chosen = settings.rows or (("llama_8b_8_h100",) if settings.quick else ())
    checks = []
    for row in (*ROWS, *PIPELINES):
        if not chosen or row.name in chosen:
            check = check_of(row)
            checks.append(check)
            errors = [
                "-" if error is None else f"{error:+.1%}"
                for error in (check.time_error, check.memory_error, check.stated_error)
            ]
            line = f"{row.name:40s} time {errors[0]:>8s} memory {errors[1]:>8s} {errors[2]:>8s}"
            print(line, flush=True)
    rows = measurements(checks)
    publish(
        out,
        experiment="prediction_check",
        question=QUESTION,
        settings={**asdict(settings), "published": [asdict(check.row) for check in checks]},
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}, checks),
        figures={"prediction_check": draw(checks)},
    )


if __name__ == "__main__":
    program(main)
