"""How far off are the predictions for published steps on GPUs?

    python experiments/prediction_check.py [--rows NAME …] [--out DIR]

Every row of moe_jax/predict/published.py is compiled and predicted as experiments/predict.py does.
Programs are cached, so a run that was stopped goes on with the rows that are missing.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compiler warns of memory in its own words.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from matplotlib.figure import Figure

from moe_jax.base.errors import near_name
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.predict.answer import Answer, answer, read_command
from moe_jax.predict.published import ROWS, Row
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
        known = [row.name for row in ROWS]
        for name in self.rows:
            require(
                name in known,
                f"rows: unknown row {name}: use some of {', '.join(known)}{near_name(name, known)}",
            )


@dataclass(frozen=True)
class Check:
    """A row and its prediction."""

    row: Row
    found: Answer

    @property
    def time_error(self) -> float | None:
        """Predicted over published seconds, less 1."""
        if self.row.seconds is None:
            return None
        return self.found.prediction.seconds / self.row.seconds - 1

    @property
    def memory_error(self) -> float | None:
        """Predicted over published bytes, less 1."""
        return None if self.row.memory is None else self.found.memory.total / self.row.memory - 1


def measurements(checks: Sequence[Check]) -> list[Measurement]:
    """Two errors a row, what they are of, and summary's numbers."""
    rows = []
    for check in checks:
        name = check.row.name
        prediction = check.found.prediction
        use = "calibrates" if check.row.calibrates else "tests"
        if check.time_error is not None:
            rows.append(Measurement(f"{name}.time_error", check.time_error, f"relative, {use}"))
            ends = [prediction.low, prediction.high]
            unit = "s, PREDICTED"
            rows.append(Measurement(f"{name}.seconds", prediction.seconds, unit, interval=ends))
            rows.append(Measurement(f"{name}.published_seconds", check.row.seconds, "s"))
        if check.memory_error is not None:
            rows.append(Measurement(f"{name}.memory_error", check.memory_error, "relative"))
            memory = check.found.memory.total
            rows.append(Measurement(f"{name}.bytes", memory, "bytes, compiled, with stated terms"))
            rows.append(Measurement(f"{name}.published_bytes", check.row.memory, "bytes"))
    return rows + summary(checks)


def summary(checks: Sequence[Check]) -> list[Measurement]:
    """Medians and the worst."""
    tests = [check for check in checks if not check.row.calibrates]
    times = [abs(check.time_error) for check in tests if check.time_error is not None]
    sizes = [abs(check.memory_error) for check in checks if check.memory_error is not None]
    within = [
        check.found.prediction.low <= check.row.seconds <= check.found.prediction.high
        for check in tests
        if check.row.seconds is not None
    ]
    unit = "relative, of rows that calibrate nothing"
    return [
        Measurement("median_time_error", statistics.median(times) if times else None, unit),
        Measurement("worst_time_error", max(times, default=None), unit),
        Measurement("inside_interval", sum(within) / len(within) if within else None, "of rows"),
        Measurement(
            "median_memory_error", statistics.median(sizes) if sizes else None, "relative, all rows"
        ),
    ]


def draw(checks: Sequence[Check]) -> Figure:
    """Predicted over published seconds, with intervals, on a line for each row."""
    timed = [check for check in checks if check.row.seconds is not None]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(timed)), layout="constrained")
    axes = figure.subplots()
    for place, check in enumerate(timed):
        published = check.row.seconds
        assert published is not None
        prediction = check.found.prediction
        ratio = prediction.seconds / published
        ends = [[ratio - prediction.low / published], [prediction.high / published - ratio]]
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
        f"{share('median_memory_error')}. Their programs differ from ours (published.py says how)."
    )


def main(argv: list[str]) -> None:
    """Compiles, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    chosen = settings.rows or (("llama_8b_8_h100",) if settings.quick else ())
    checks = []
    for row in ROWS:
        if not chosen or row.name in chosen:
            check = Check(row, answer(*read_command(row.argv)))
            checks.append(check)
            errors = [
                "-" if error is None else f"{error:+.1%}"
                for error in (check.time_error, check.memory_error)
            ]
            print(f"{row.name:40s} time {errors[0]:>8s} memory {errors[1]:>8s}", flush=True)
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
